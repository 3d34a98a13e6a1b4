"""Whether a module still computes what it computed when it was recognised, asked in every call that passes it over.

Three things may change: a method of its class, an attribute of its own, and who watches the calls of all modules. Each
is compared; none is remembered. Its parameters, its children and `training` are not looked at: those are read anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from .class_swap import STATE, original_type

F = TypeVar("F", bound=Callable[..., Any])

_ORDINARY = frozenset({*nn.Module().__dict__, STATE, "_is_hf_initialized"})
"""What every module has, and a note of transformers'."""
_VALUES = frozenset({bool, int, float, complex, str, bytes, type(None)})
"""Types whose equal values are the same; of all others only the same object is."""
_GONE = object()
_OBSERVES = "_safe_observes"
_TRACKER = "torch.utils.module_tracker"


class Code:
    """What decides, other than its parameters and children, what a module computes.

    Args:
        module: bound or not, as it is now.
        read: names of attributes that are read in every call, and so may change.
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
        """Say in a few words what is no longer as it was; None if everything is.

        Args:
            module: the same one, or what has taken its place.
        """
        if module is None:
            return f"{self.kind.__name__} was taken away"
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
        return None if self.mutable is None else f"{kind.__name__} reads {self.mutable}, which may change within"


def own_method(kind: type, name: str) -> Any:
    """Return a class's method; None if it was put there from outside the class's package, which mostly wraps its own.

    Args:
        kind: the class.
        name: of the method.
    """
    method = getattr(kind, name)
    owner = next(base for base in kind.__mro__ if name in base.__dict__).__module__
    module = getattr(method, "__globals__", {}).get("__name__", owner)
    return method if module.partition(".")[0] == owner.partition(".")[0] else None


def _helpers(kind: Any) -> list[str]:
    """Names of a class's own attributes that its forward reads: methods that it calls, mostly none."""
    found: list[str] = []
    rest = list(_names(kind.forward))
    while rest:
        name = rest.pop()
        if name not in found and hasattr(kind, name) and not hasattr(nn.Module, name):
            found.append(name)
            rest += _names(getattr(kind, name))
    return found


def _names(method: Any) -> tuple[str, ...]:
    """Names that a function reads: attributes among them."""
    code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    return getattr(code, "co_names", ())


def _is_fixed(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return type(value) in _VALUES or callable(value) or isinstance(value, torch.dtype | torch.device | Enum)


def observes(hook: F) -> F:
    """Decorator: as a hook on the calls of all modules it only looks, so it need not see those that are passed over."""
    setattr(hook, _OBSERVES, True)
    return hook


def watched() -> bool:
    """Whether a hook on the calls of all modules would miss those that are passed over."""
    if not (_global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks):
        return False
    return not all(map(_only_observes, _global_hooks()))


def _global_hooks() -> Iterator[Any]:
    for hooks in (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks):
        yield from hooks.values()


def _only_observes(hook: Any) -> bool:
    """Our own, and those of PyTorch that keep a stack of names (`FlopCounterMode`)."""
    return hasattr(hook, _OBSERVES) or type(getattr(hook, "__self__", None)).__module__ == _TRACKER
