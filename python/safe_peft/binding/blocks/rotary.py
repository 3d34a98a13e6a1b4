"""Attention whose queries and keys are rotated by a function of its Python file, as in transformers' models.

The module's own forward runs, in a copy that finds our op under the function's name. The function and the names that it
reads are compared in every call, so another package may replace them at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

import safe_kernels
from safe_kernels import reference

from ..class_swap import is_transformed, original_type
from ..code import own_method
from .base import Part, agrees, is_plain, sample

_PARAMETERS = ["q", "k", "cos", "sin"]


class _Names(dict[str, Any]):
    """The global names of a module, some of them with other values."""

    def __init__(self, module: dict[str, Any], **others: Any) -> None:
        super().__init__(others)
        self.module = module

    def __missing__(self, name: str) -> Any:
        return self.module[name]


@dataclass
class Rotary(Part):
    """An attention module that calls a rotary position embedding.

    Args:
        name: of the function, among the global names of the forward.
        keeps_dtype: whether its results have the dtype of q and k, also if cos and sin have another one.
        takes_part: whether cos and sin may be for the first features of each head.
    """

    stem = "attention"
    op = "safe_kernels::rotary"
    name: str
    keeps_dtype: bool
    takes_part: bool
    _forward: Any = None
    _run: Any = None
    _known: tuple[tuple[dict[str, Any], str, Any], ...] = ()

    @classmethod
    def recognise(cls, module: nn.Module) -> Rotary | None:
        """Recognise the function by its results for a query and a key."""
        forward = own_method(original_type(module), "forward")
        inner = inspect.unwrap(forward) if forward is not None else None
        if not isinstance(inner, FunctionType):
            return None
        names = inner.__globals__
        for name in inner.__code__.co_names:
            rotate = names.get(name)
            if not isinstance(rotate, FunctionType) or not _rotates(rotate):
                continue
            part = cls(name, _keeps_dtype(rotate), _rotates(rotate, width=6), forward)
            part._known = ((names, name, rotate), *_read_by(rotate))
            part._run = _renamed(forward, _Names(names, **{name: part._rotate(rotate)}))
            return None if part._run is None else part
        return None

    def refusal(self, module: nn.Module) -> str | None:
        if original_type(module).forward is not self._forward or "forward" in module.__dict__:
            return f"{original_type(module).__name__}.forward is replaced"
        for names, name, value in self._known:
            if names.get(name) is not value:
                return f"{name} is replaced"
        return None

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the op. A compiler fuses the function by itself."""
        if torch.compiler.is_compiling() or is_transformed() or self.refusal(module) is not None:
            return None
        return self._run(module, *args, **kwargs)

    def _rotate(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or not self._takes(q, k, cos, sin):
                return own(q, k, cos, sin, *args, **kwargs)
            return safe_kernels.rotary(q, cos, sin), safe_kernels.rotary(k, cos, sin)

        return rotate

    def _takes(self, q: Any, k: Any, cos: Any, sin: Any) -> bool:
        """Whether the op computes a call, with results as the function gives them."""
        if not is_plain(q, k, cos, sin) or cos.requires_grad or sin.requires_grad or cos.shape != sin.shape:
            return False
        if cos.dtype != sin.dtype or not (self.keeps_dtype or q.dtype == k.dtype == cos.dtype):
            return False
        return all(
            x.dim() == 4
            and x.stride(1) <= x.stride(2)
            and cos.dim() == 3
            and cos.shape[0] in (1, x.shape[0])
            and cos.shape[1] == x.shape[2]
            and (cos.shape[2] == x.shape[3] or (self.takes_part and cos.shape[2] < x.shape[3]))
            and cos.shape[2] % 2 == 0
            for x in (q, k)
        )


def _rotates(function: FunctionType, width: int = 8) -> bool:
    """Whether a function rotates queries and keys by the formula of the op."""
    if list(inspect.signature(function).parameters)[:4] != _PARAMETERS:
        return False
    q, k = sample(2, 3, 5, 8), sample(2, 1, 5, 8, seed=1)
    cos, sin = sample(2, 5, width, seed=2), sample(2, 5, width, seed=3)
    expected = [reference.rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k)]
    return all(agrees(lambda i=i: function(q, k, cos, sin)[i], expected[i]) for i in (0, 1))  # type: ignore[misc]


def _read_by(function: FunctionType) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Yield the global names that a function and the functions behind these names read, with their values."""
    rest, done = [function], {function}
    for reader in rest:
        names = reader.__globals__
        for name in names.keys() & set(reader.__code__.co_names):
            yield names, name, names[name]
            if isinstance(names[name], FunctionType) and names[name] not in done:
                done.add(names[name])
                rest.append(names[name])


def _keeps_dtype(function: FunctionType) -> bool:
    q, cos = sample(1, 1, 2, 4).bfloat16(), torch.ones(1, 2, 4)
    return agrees(lambda: function(q, q, cos, cos)[0].mul(0), torch.zeros_like(q))


def _renamed(function: Any, names: dict[str, Any]) -> Any:
    """Return a copy of a function that has other global names, inside its decorators; None if that cannot be done."""
    inner, cells = getattr(function, "__wrapped__", None), function.__closure__
    if inner is None:
        made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    else:
        changed = _renamed(inner, names)
        if changed is None or not any(cell.cell_contents is inner for cell in cells or ()):
            return None
        cells = tuple(CellType(changed) if cell.cell_contents is inner else cell for cell in cells)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made
