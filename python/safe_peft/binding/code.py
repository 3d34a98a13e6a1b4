"""Checks whether a module still computes what it computed when it was recognised.

Every call that skips the module makes this check. Three things may change: a method of its class, one of its
attributes, and the global hooks on the calls of all modules. Each call compares all three. Parameters, children and
`training` are not compared, because every call reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from enum import Enum
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


def own_method(kind: type, name: str) -> Any:
    """Return a class's method; None if another package has replaced the method, usually with a wrapper."""
    method = getattr(kind, name)
    owner = next(base for base in kind.__mro__ if name in base.__dict__).__module__
    module = getattr(method, "__globals__", {}).get("__name__", owner)
    return method if module.partition(".")[0] == owner.partition(".")[0] else None


def own_methods(*methods: tuple[type, str]) -> Methods:
    """Return what `replaced` needs to know about methods, each given by its class and name."""
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
