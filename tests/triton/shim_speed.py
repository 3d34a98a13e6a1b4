"""Spares Triton's interpreter what it does again at each call of a function and for each number; results are the same.

It looks through all of Triton's language for each call of a function, and makes a table of all dtypes for each number.
That is a third of what the kernels' tests take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

served: set[Callable[..., Any]] = set()
"""The functions whose modules speak the interpreter's language already, in the launch that runs."""


def beginning(before: Callable[..., Any]) -> Callable[..., Any]:
    def arguments(self: Any, *args: Any) -> Any:
        served.clear()
        return before(self, *args)

    return arguments


def patching(before: Callable[..., Any]) -> Callable[..., Any]:
    def patch(function: Callable[..., Any], *rest: Any) -> Any:
        if function in served:
            return None
        served.add(function)
        return before(function, *rest)

    return patch


def remembering(before: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[str, np.dtype[Any]] = {}

    def kind_of(kind: Any) -> np.dtype[Any]:
        scalar = kind.scalar
        if isinstance(scalar, tl.pointer_type):
            return before(scalar)
        found = known.get(scalar.name)
        if found is None:
            found = known[scalar.name] = before(scalar)
        return found

    return kind_of


def install() -> None:
    """Patches the interpreter of this process."""
    GridExecutor._init_args_hst = beginning(GridExecutor._init_args_hst)
    interpreter._patch_lang = patching(interpreter._patch_lang)
    interpreter._get_np_dtype = remembering(interpreter._get_np_dtype)
