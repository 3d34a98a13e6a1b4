"""Attention whose queries and keys are rotated by a function of its Python file, as in transformers' models.

The module's own forward runs, in a copy that finds our op under the function's name. The function and the names that it
reads are compared in every call, so another package may replace them at any time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

import safe_kernels
from safe_kernels import reference

from ..adapters.base import FLOATS
from ..class_swap import is_transformed, original_type
from ..code import FunctionCode, definition, names_read, own_method, redefined
from .base import Part, agrees, is_plain, sample

_PARAMETERS = ["q", "k", "cos", "sin"]
_READ_BY_PYTHON = ("__builtins__", "__name__", "__package__", "__path__", "__spec__", "__warningregistry__")
"""Global names that relative imports and warnings need."""


class _Names(dict[str, Any]):
    """The global names of a module, with a replacement for the recognised function while it is unchanged.

    Python looks names up in the dictionary itself first, and then in `__missing__`.
    """

    def __init__(self, module: dict[str, Any], name: str, code: FunctionCode, ours: Callable[..., Any]) -> None:
        super().__init__({own: module[own] for own in _READ_BY_PYTHON if own in module})
        self.module, self.name, self.code, self.ours = module, name, code, ours

    def __missing__(self, name: str) -> Any:
        return self.ours if name == self.name and self.code.change() is None else self.module[name]


@dataclass
class Rotary(Part):
    """An attention module that calls a rotary position embedding.

    Args:
        name: of the function, among the global names of the forward.
        code: of the function.
        dtypes: of q and k, and of cos and sin; and for each such pair the dtype of the results.
        takes_part: whether cos and sin may cover only the first features of each head.
    """

    stem = "attention"
    op = "safe_kernels::rotary"
    name: str
    code: FunctionCode
    dtypes: dict[tuple[torch.dtype, torch.dtype], torch.dtype]
    takes_part: bool
    _levels: tuple[tuple[FunctionType, CodeType, Any, dict[str, Any] | None], ...] = ()
    _run: Any = None

    @classmethod
    def recognise(cls, module: nn.Module) -> Rotary | None:
        """Recognise the function by its results for a query and a key."""
        forward = own_method(original_type(module), "forward")
        levels = list(_levels(forward))
        if not levels or not all(isinstance(level, FunctionType) for level in levels):
            return None
        names = levels[-1].__globals__
        for name in filter(lambda name: _is_named_so(names.get(name)), levels[-1].__code__.co_names):
            try:
                found, code = name in names_read(levels[-1]), FunctionCode(names, name)
            except ValueError:
                continue
            if not found or not _rotates(names[name]):
                continue
            part = cls(name, code, _dtypes(names[name]), _rotates(names[name], width=6))
            part._levels = tuple((level, *definition(level)) for level in levels)
            part._run = _renamed(forward, _Names(names, name, code, part._rotate(names[name])))
            return None if part._run is None else part
        return None

    def refusal(self, module: nn.Module) -> str | None:
        return self._replaced(module) or self.code.change()

    def _replaced(self, module: nn.Module) -> str | None:
        """Return in a few words whether the module has another forward than the recognised one."""
        kind: Any = original_type(module)
        same = kind.forward is self._levels[0][0] and "forward" not in module.__dict__
        if same and not any(redefined(*level) for level in self._levels):
            return None
        return f"{kind.__name__}.forward is replaced"

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward with the op; None while compiling, because a compiler fuses the function."""
        if torch.compiler.is_compiling() or is_transformed() or self._replaced(module) is not None:
            return None
        return self._run(module, *args, **kwargs)

    def _rotate(self, own: Callable[..., Any]) -> Callable[..., Any]:
        defaults = {name: parameter.default for name, parameter in inspect.signature(own).parameters.items()}

        def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            others = args or any(type(x) is not type(defaults.get(n)) or x != defaults[n] for n, x in kwargs.items())
            if others or not self._takes(q, k, cos, sin):
                return own(q, k, cos, sin, *args, **kwargs)
            dtype = self.dtypes[q.dtype, cos.dtype]
            return safe_kernels.rotary(q.to(dtype), cos, sin), safe_kernels.rotary(k.to(dtype), cos, sin)

        return rotate

    def _takes(self, q: Any, k: Any, cos: Any, sin: Any) -> bool:
        """Whether the op supports a call and gives results of the same dtypes as the function."""
        if not is_plain(q, k, cos, sin) or cos.requires_grad or sin.requires_grad or cos.shape != sin.shape:
            return False
        if q.dtype != k.dtype or cos.dtype != sin.dtype or (q.dtype, cos.dtype) not in self.dtypes:
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


def _is_named_so(value: Any) -> bool:
    """Whether a value is a function whose first arguments have the names of those of a rotary position embedding."""
    try:
        return isinstance(value, FunctionType) and list(inspect.signature(value).parameters)[:4] == _PARAMETERS
    except (TypeError, ValueError):  # an invalid __signature__
        return False


def _rotates(function: FunctionType, width: int = 8) -> bool:
    """Whether a function rotates queries and keys by the formula of the op."""
    given = (sample(2, 3, 5, 8), sample(2, 1, 5, 8, seed=1), sample(2, 5, width, seed=2), sample(2, 5, width, seed=3))
    expected = [reference.rotary(x.transpose(1, 2), *given[2:]).transpose(1, 2) for x in given[:2]]
    return all(agrees(lambda i=i: _try(function, *given)[i], expected[i]) for i in (0, 1))  # type: ignore[misc]


def _try(function: FunctionType, *given: Tensor) -> tuple[Tensor, Tensor]:
    """Call a function that should return two tensors and change nothing.

    Raises:
        TypeError: It does something else.
    """
    copies = [tensor.clone() for tensor in given]
    found = function(*copies)
    if type(found) is not tuple or len(found) != 2 or not all(map(torch.equal, copies, given)):
        raise TypeError(f"{function.__name__} must return two tensors and leave its arguments as they are")
    return found


@torch.no_grad()
def _dtypes(function: FunctionType) -> dict[tuple[torch.dtype, torch.dtype], torch.dtype]:
    """Return the dtype of both results for the dtypes of q and k, and of cos and sin: the same one, or float32."""
    results: dict[tuple[torch.dtype, torch.dtype], torch.dtype] = {}
    for pair in {pair for dtype in FLOATS for pair in ((dtype, dtype), (dtype, torch.float32))}:
        q, cos = torch.ones(1, 1, 2, 4, dtype=pair[0]), torch.ones(1, 2, 4, dtype=pair[1])
        try:
            found = {x.dtype for x in _try(function, q, q, cos, cos)}
        except Exception:
            continue
        if len(found) == 1 and found <= {pair[0], torch.promote_types(*pair)}:
            results[pair] = found.pop()
    return results


def _levels(function: Any) -> Iterator[FunctionType]:
    """Yield a function and those inside its decorators."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _renamed(function: Any, names: dict[str, Any]) -> Any:
    """Return a copy of a function that has other global names, inside its decorators; None if that cannot be done."""
    inner, cells = getattr(function, "__wrapped__", None), function.__closure__
    if inner is None:
        made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    else:
        changed = _renamed(inner, names)
        if changed is None or not any(_holds(cell, inner) for cell in cells or ()):
            return None
        cells = tuple(CellType(changed) if _holds(cell, inner) else cell for cell in cells)
        made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _holds(cell: CellType, function: Any) -> bool:
    try:
        return cell.cell_contents is function
    except ValueError:  # the decorator has not assigned it yet
        return False
