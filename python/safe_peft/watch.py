"""Watches a model's forwards, in a way that copies and pickles of the model know nothing of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

Begin = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]


class Watcher:
    """A forward pre-hook that stays behind when its module is copied or pickled.

    Args:
        begin: called with the module and its arguments before each forward.
    """

    def __init__(self, begin: Begin) -> None:
        self._begin = begin

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run before a forward."""
        self._begin(module, args, kwargs)

    def __reduce__(self) -> Any:
        """Its place in a copy is taken by a standard function that does nothing and needs nothing to be loaded."""
        return getattr, (nullcontext(), "__exit__")


def watch(model: nn.Module, begin: Begin) -> list[RemovableHandle]:
    """Have a function called before each forward of a model, and of the one inside PEFT's, which may be called itself.

    Args:
        model: a PEFT model, or one that holds adapter layers.
        begin: takes the module, its arguments and its keyword arguments.

    Returns:
        Handles whose `remove` ends it.

    Example:
        >>> handles = watch(nn.Linear(2, 2), lambda module, args, kwargs: print("begins"))
        >>> handles[0].remove()
    """
    get_base_model = getattr(model, "get_base_model", None)
    inner = get_base_model() if callable(get_base_model) else model
    hook = Watcher(begin)
    return [module.register_forward_pre_hook(hook, with_kwargs=True) for module in dict.fromkeys((model, inner))]
