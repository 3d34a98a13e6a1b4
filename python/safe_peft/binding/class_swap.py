"""Changes the class of an existing module to a subclass, and back. All binding in place works in this way.

The instance keeps its identity, its attributes and its hooks. `isinstance`, the state dict's keys and the printed
module do not change. Copies and pickles have the original class.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn

STATE = "_safe_state"
"""The only attribute that binding adds to a module."""


class SwappedModule(nn.Module):
    """Base of the classes that binding puts on instances; `original` is the class that the instance had."""

    original: ClassVar[type[nn.Module]]
    # Code that wraps or compiles a bound module (torch.compile) may keep a bound method and call it after unbinding.
    # Each `forward` and `__call__` then delegates to the original class.

    def _get_name(self) -> str:
        return self.original.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle the module with its original class, without the binding."""
        # In protocol 1 the class is an ordinary argument; from protocol 2 on, pickle requires the object's own class.
        reduced: Any = super().__reduce_ex__(1)
        function, (_, *arguments), attributes = reduced
        return function, (self.original, *arguments), {k: v for k, v in attributes.items() if k != STATE}


@cache
def _without(kind: type) -> type:
    """Return a class without the change of `swap_class`, also if `fully_shard` has put its own class on top."""
    if "original" in kind.__dict__:
        return kind.__dict__["original"]
    if not issubclass(kind, SwappedModule):
        return kind
    return type(kind.__name__, tuple(map(_without, kind.__bases__)), dict(kind.__dict__))


@cache
def _swapped_class(mixin: type[SwappedModule], original: type[nn.Module]) -> type[SwappedModule]:
    """Return the subclass of `original` with the behaviour of `mixin`: one class for all instances."""
    names = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    made = type(original.__name__, (mixin, original), names)
    if "forward" in vars(made):
        # transformers' layers wrap `forward` for every subclass, and keep the `forward` of that moment. The class
        # may be patched later. The original class has the same wrapper.
        delattr(made, "forward")
    return made


def swap_class(module: nn.Module, mixin: type[SwappedModule], state: object) -> None:
    """Give an unbound instance the behaviour of `mixin`, with a `state` that is in no state dict and no optimizer."""
    module.__dict__[STATE] = state
    module.__class__ = _swapped_class(mixin, type(module))  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> None:
    """Give an instance its own class back. A second call has no effect."""
    if isinstance(module, SwappedModule):
        module.__dict__.pop(STATE, None)
        module.__class__ = _without(type(module))  # type: ignore[arg-type]


def is_bound(module: nn.Module) -> bool:
    """Whether `swap_class` was called for the module, and not undone."""
    return STATE in module.__dict__


def original_type(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module has when it is not bound."""
    return module.original if isinstance(module, SwappedModule) else type(module)


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward of a module's own class."""
    return original_type(module).forward(module, *args, **kwargs)


def is_transformed() -> bool:
    """Whether `torch.func` or `torch.jit.trace` is active: they support only PyTorch's own ops."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None


def saves_by_hooks() -> bool:
    """Whether hooks of the user get what autograd saves, as with `save_on_cpu` or a checkpoint around the model."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def forbids_hooks() -> bool:
    """Whether the user has forbidden hooks for saved tensors, with `disable_saved_tensors_hooks`."""
    autograd: Any = torch._C._autograd
    return not autograd._saved_tensors_hooks_is_enabled()


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for a tensor's device; some devices, such as "meta", have no autocast."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks or a replaced forward, so that its call cannot be skipped."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safe_peft")


def package_of(hook: Any) -> str:
    """Return the top-level package of a hook; "" if the hook does not show it."""
    return (getattr(hook, "__module__", None) or "").partition(".")[0]


def is_of_user(hook: Any) -> bool:
    """Whether a hook is not one of the libraries' own, which need no gradient and keep no tensor."""
    return package_of(hook) not in _LIBRARIES
