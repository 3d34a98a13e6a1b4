"""Kernels for GPUs in Triton, one file a stem: `_xxx_kernel` runs there, the host function has the op's signature.

They are registered on PyTorch's CUDA key, which is that of AMD GPUs too. Where Triton is not installed nothing is
registered, and the reference serves GPUs as it serves every device that has no kernel of its own.

Triton itself is imported by the first call that needs it, so that importing `safe_kernels` costs nothing on a machine
without a GPU, and cannot fail because of a broken Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from safe_kernels import _C
from safe_kernels.triton.runtime import launch_replay

STEMS: dict[str, tuple[str, ...]] = {
    "activation": ("activation", "activation_backward"),
    "dropout": ("dropout",),
    "gated_activation": ("gated_activation", "gated_activation_backward"),
    "layer_norm": ("layer_norm", "layer_norm_backward"),
    "lora": ("lora", "lora_backward"),
    "lora_linear": ("lora_linear", "lora_linear_backward"),
    "rms_norm": ("rms_norm", "rms_norm_backward"),
}
"""Ops by the file that holds their host functions."""


def installed() -> bool:
    """Whether there is a Triton to compile the kernels with.

    Returns:
        True if the package can be found; it is not imported.

    Example:
        >>> isinstance(installed(), bool)
        True
    """
    return importlib.util.find_spec("triton") is not None


def host_function(op: str) -> Callable[..., Any]:
    """The function that launches an op's kernels; importing it imports Triton.

    Args:
        op: the op's name, `lora` for instance.

    Returns:
        A function with the arguments and results of the op's schema.

    Raises:
        KeyError: no Triton kernel serves this op.

    Example:
        >>> host_function("lora").__module__  # doctest: +SKIP
        'safe_kernels.triton.lora'
    """
    for stem, ops in STEMS.items():
        if op in ops:
            return getattr(importlib.import_module(f"{__name__}.{stem}"), op)
    raise KeyError(op)


def register() -> bool:
    """Registers every op on the CUDA key, for as long as the process lives.

    Returns:
        Whether Triton is installed; otherwise nothing is registered.

    Example:
        >>> register() or "there is no Triton"  # doctest: +SKIP
    """
    if not installed():
        return False
    for ops in STEMS.values():
        for op in ops:
            register_replayed(op, "CUDA")
    return True


def register_replayed(op: str, key: str) -> None:
    """Registers an op's host function, whose launch records C++ replays.

    Args:
        op: the op's name.
        key: a dispatch key.

    Example:
        >>> register_replayed("lora", "CUDA")  # doctest: +SKIP
    """
    host = _deferred(op)
    _C.register_replayed(op, host, launch_replay.recorded(host), key)


def _deferred(op: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def kernel(*args: Any) -> Any:
        if not found:
            found.append(host_function(op))
        return found[0](*args)

    return kernel
