"""Puts a subclass on an existing module's instance, and takes it off: how everything here binds a model in place.

The instance keeps its identity, its attributes and its hooks; `isinstance`, the state dict's keys and what is printed
stay as they were. Copies and pickles of it are of the original class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

STATE = "_safe_state"
"""The one attribute that binding adds to a module."""


class Swapped(nn.Module):
    """Base of the classes that binding puts on instances; `original` is the class that the instance had."""

    original: ClassVar[type[nn.Module]]
    # Code that wraps or compiles a bound module keeps its method, and may call it when the module is bound no more:
    # then each `forward` and `__call__` passes the call on to the module's own class.

    def _get_name(self) -> str:
        return self.original.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copied or pickled module is an ordinary one: no binding comes along, and none is needed to load."""
        # Protocol 1's form names the class as a mere argument; from 2 on, pickle insists on the object's own class.
        reduced: Any = super().__reduce_ex__(1)
        function, (_, *arguments), attributes = reduced
        return function, (self.original, *arguments), {k: v for k, v in attributes.items() if k != STATE}


_WITHOUT: dict[type, type] = {}


def _without(kind: type) -> type:
    """A class without what `put_on` has made of it, also where `fully_shard` has put a class of its own on top."""
    if "original" in kind.__dict__:
        return kind.__dict__["original"]
    if not issubclass(kind, Swapped):
        return kind
    if kind not in _WITHOUT:
        bases, own = tuple(map(_without, kind.__bases__)), dict(kind.__dict__)
        _WITHOUT[kind] = type(kind.__name__, bases, own)
    return _WITHOUT[kind]


_CLASSES: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


def swapped_class(mixin: type[Swapped], original: type[nn.Module]) -> type[Swapped]:
    """Return the subclass of `original` that behaves as `mixin` says: one for all instances."""
    if (mixin, original) not in _CLASSES:
        names = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
        made = type(original.__name__, (mixin, original), names)
        if "forward" in vars(made):
            # transformers' layers wrap it for every subclass, and keep what their class had at that moment; the class
            # may be patched later. It has the same wrapper itself.
            delattr(made, "forward")
        _CLASSES[mixin, original] = made
    return _CLASSES[mixin, original]


def put_on(module: nn.Module, mixin: type[Swapped], state: object) -> None:
    """Make an instance behave as `mixin` says, with `state` for it to read.

    Args:
        module: not bound yet.
        mixin: the behaviour.
        state: kept in the instance's `__dict__`, where neither a state dict nor an optimizer sees it.
    """
    module.__dict__[STATE] = state
    module.__class__ = swapped_class(mixin, type(module))


def take_off(module: nn.Module) -> None:
    """Give an instance its own class back. Doing it twice does no harm."""
    if isinstance(module, Swapped):
        module.__dict__.pop(STATE, None)
        module.__class__ = _without(type(module))


def is_bound(module: nn.Module) -> bool:
    """Whether `put_on` was called for it, and not undone."""
    return STATE in module.__dict__


def original_type(module: nn.Module) -> type[nn.Module]:
    """The class a module has when it is not bound."""
    return module.original if isinstance(module, Swapped) else type(module)


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward of a module's own class."""
    return original_type(module).forward(module, *args, **kwargs)


def is_transformed() -> bool:
    """Whether `torch.func` transforms or `torch.jit` traces what runs: they know PyTorch's own ops only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for a tensor's device; there are some, such as "meta", that know no autocast."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see its calls, so that it cannot be passed over."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
