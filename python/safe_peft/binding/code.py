"""Checks whether a module, or a function, still computes what it computed when it was recognised.

Every call that skips the module makes this check. Three things may change: a method of its class, one of its
attributes, and the global hooks on the calls of all modules. Each call compares all three. Parameters, children and
`training` are not compared, because every call reads them.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from .class_swap import STATE, original_type

F = TypeVar("F", bound=Callable[..., Any])
Methods = tuple[tuple[type, str, Any], ...]
"""Classes, names of methods, and the classes' own methods of these names."""

_ORDINARY = frozenset({*nn.Module().__dict__, STATE, "_is_hf_initialized"})
"""Attributes of every module, and a note of transformers."""
_VALUES = frozenset({bool, int, float, complex, str, bytes, type(None)})
"""Types that are compared by value; all others are compared by identity."""
_GONE = object()
_OBSERVES = "_safe_observes"
_CHANGERS = frozenset({"globals", "exec", "eval"})
"""Functions that may change the global names of their caller."""
_STABLE = ("builtins", "math", "torch", "typing")
"""Packages whose modules and classes are assumed not to change."""
_TRACKER = "torch.utils.module_tracker"
_HOOKS_ON_ALL: tuple[dict[int, Any], ...] = (
    global_hooks._global_forward_hooks,
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_backward_hooks,
    global_hooks._global_backward_pre_hooks,
)


class Code:
    """A module's methods and attributes: what it computes depends on these, its parameters and its children.

    Args:
        module: bound or not, in its current state.
        read: names of attributes that every call reads, and that may therefore change.
    """

    __slots__ = ("attributes", "call", "forward", "helpers", "kind", "mutable")

    def __init__(self, module: nn.Module, read: Collection[str] = ()) -> None:
        kind = self.kind = original_type(module)
        self.forward, self.call = own_method(kind, "forward"), own_method(kind, "__call__")
        self.helpers = tuple((name, own_method(kind, name)) for name in _helpers(kind))
        ignored = {*_ORDINARY, *read}
        self.attributes = tuple(item for item in module.__dict__.items() if item[0] not in ignored)
        used = {name for method in ("forward", *dict(self.helpers)) for name in _names(getattr(kind, method))}
        self.mutable = next((name for name, v in self.attributes if name in used and not _is_fixed(v)), None)

    def change(self, module: nn.Module | None) -> str | None:
        """Return in a few words what has changed in the module, or in its replacement; None if nothing has."""
        if module is None:
            return f"{self.kind.__name__} was removed"
        kind: type = type(module)
        if kind is not self.kind and (kind := original_type(module)) is not self.kind:
            return f"{kind.__name__} has taken the place of {self.kind.__name__}"
        own = module.__dict__
        if kind.forward is not self.forward or "forward" in own:  # type: ignore[attr-defined]
            return f"{kind.__name__}.forward is replaced"
        if kind.__call__ is not self.call:
            return f"{kind.__name__}.__call__ is replaced"
        for name, method in self.helpers:
            if getattr(kind, name, None) is not method or name in own:
                return f"{kind.__name__}.{name} is replaced"
        for name, value in self.attributes:
            now = own.get(name, _GONE)
            if now is not value and (type(now) is not type(value) or type(now) not in _VALUES or now != value):
                return f"{name} has changed"
        return None if self.mutable is None else f"{kind.__name__} reads {self.mutable}, whose contents may change"


class FunctionCode:
    """A function under a global name, and all that it and the functions behind it read.

    Args:
        names: the global names of a module.
        name: of the function.

    Raises:
        ValueError: The function changes names, or reads something that may change and still be the same object.
    """

    __slots__ = ("cells", "functions", "names")

    def __init__(self, names: dict[str, Any], name: str) -> None:
        self.names = [(names, name, names[name])]
        self.cells = list[tuple[CellType, Any]]()
        rest: list[FunctionType] = [names[name]]
        for reader in rest:
            known = [(reader.__globals__, each, reader.__globals__.get(each, _GONE)) for each in names_read(reader)]
            cells = [(cell, cell.cell_contents) for cell in reader.__closure__ or ()]
            defaults = (*(reader.__defaults__ or ()), *(reader.__kwdefaults__ or {}).values())
            for value in (*(value for _, _, value in known), *(value for _, value in cells), *defaults):
                if not _is_compared(value):
                    raise ValueError(f"{reader.__name__} reads a {type(value).__name__}, whose contents may change")
                if isinstance(value, FunctionType) and value not in rest:
                    rest.append(value)
            self.names += known
            self.cells += cells
        self.functions = [(each, *definition(each)) for each in rest]

    def change(self) -> str | None:
        """Return in a few words what has changed; None if nothing has."""
        for names, name, value in self.names:
            if names.get(name, _GONE) is not value:
                return f"{name} is replaced"
        for function, *known in self.functions:
            if redefined(function, *known):
                return f"{function.__name__} is redefined"
        for cell, value in self.cells:
            if cell.cell_contents is not value:
                return f"a variable around {self.names[0][1]} has changed"
        return None


def definition(function: FunctionType) -> tuple[CodeType, Any, dict[str, Any] | None]:
    """Return a function's code and default arguments, for `redefined`."""
    return function.__code__, function.__defaults__, copy.copy(function.__kwdefaults__)


def redefined(function: FunctionType, code: CodeType, defaults: Any, kwdefaults: dict[str, Any] | None) -> bool:
    """Whether another package has given a function, still the same object, other code or default arguments."""
    same = function.__code__ is code and function.__defaults__ is defaults
    return not same or function.__kwdefaults__ != kwdefaults


def names_read(function: FunctionType) -> list[str]:
    """Return the global names that a function reads, also in the functions and comprehensions inside it.

    Raises:
        ValueError: It may change global names, or variables of a function around it.
    """
    steps = {(step.opname, step.argval) for code in _codes(function.__code__) for step in dis.get_instructions(code)}
    read = sorted({name for step, name in steps if step in ("LOAD_GLOBAL", "LOAD_NAME")})
    changes = any(step in ("STORE_GLOBAL", "DELETE_GLOBAL") for step, _ in steps) or not _CHANGERS.isdisjoint(read)
    if changes or any(("STORE_DEREF", name) in steps for name in function.__code__.co_freevars):
        raise ValueError(f"{function.__name__} changes names")
    return read


def own_method(kind: type, name: str) -> Any:
    """Return a class's method; None if another package has replaced the method, usually with a wrapper."""
    method = getattr(kind, name)
    owner = next(base for base in kind.__mro__ if name in base.__dict__).__module__
    module = getattr(method, "__globals__", {}).get("__name__", owner)
    return method if module.partition(".")[0] == owner.partition(".")[0] else None


def own_methods(*methods: tuple[type, str]) -> Methods:
    """Return the records of methods, given by class and name, that `replaced` compares."""
    return tuple((kind, name, own_method(kind, name)) for kind, name in methods)


def replaced(methods: Methods) -> str | None:
    """Return in a few words which of the methods is no longer the class's own; None if all are."""
    for kind, name, method in methods:
        if method is None or getattr(kind, name) is not method:
            return f"{kind.__name__}.{name} is replaced"
    return None


def _helpers(kind: Any) -> list[str]:
    """Return the names of a class's own attributes that its forward reads: methods that it calls, usually none."""
    found: list[str] = []
    rest = list(_names(kind.forward))
    while rest:
        name = rest.pop()
        if name not in found and hasattr(kind, name) and not hasattr(nn.Module, name):
            found.append(name)
            rest += _names(getattr(kind, name))
    return found


def _names(method: Any) -> tuple[str, ...]:
    """Return the names that a function reads, including attributes."""
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return getattr(code, "co_names", ())


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and that of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_compared(value: Any) -> bool:
    """Whether comparing a value that a function reads, or its identity, shows every change of the value."""
    if isinstance(value, ModuleType | type):
        return (value.__name__ if isinstance(value, ModuleType) else value.__module__).partition(".")[0] in _STABLE
    compared = isinstance(value, FunctionType | BuiltinFunctionType | torch.dtype | torch.device)
    return compared or value is _GONE or type(value) in _VALUES


def _is_fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return type(value) in _VALUES or callable(value) or isinstance(value, torch.dtype | torch.device | Enum)


def observes(hook: F) -> F:
    """Decorator: this global hook only observes calls, so calls of skipped modules may be missing."""
    setattr(hook, _OBSERVES, True)
    return hook


def watched() -> bool:
    """Whether a global hook on the calls of all modules would miss the calls of skipped modules."""
    return any(_HOOKS_ON_ALL) and not all(_only_observes(hook) for hooks in _HOOKS_ON_ALL for hook in hooks.values())


def _only_observes(hook: Any) -> bool:
    """Whether a hook is one of ours, or one of PyTorch that keeps a stack of names (`FlopCounterMode`)."""
    return hasattr(hook, _OBSERVES) or type(getattr(hook, "__self__", None)).__module__ == _TRACKER
