"""Activation checkpointing of a block, switched on by transformers or by a model's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from .trains import trains

_NAME = "_gradient_checkpointing_func"
_made = WeakTensorKeyDictionary()


class Checkpointing:
    """The kind of a block's checkpointing function; another function is checked again."""

    def __init__(self) -> None:
        self._function: Any = None
        self._reentrant = False

    def is_reentrant(self, block: nn.Module) -> bool:
        """Whether the block's function first runs without a graph, and again in backward.

        A trial call decides, because the function can be any. A reentrant one calls its argument with grad mode off.
        """
        function = getattr(block, _NAME, None)
        if not checkpoints(block) or function is None:
            return False
        if function is not self._function:
            self._function, self._reentrant = function, _turns_grad_off(function)
        return self._reentrant

    def around(self, block: nn.Module, *, live: bool, passes: bool) -> Any:
        """Return a context for a call of the block, in which reentrant checkpointing trains what has to train.

        Args:
            block: the block.
            live: something in the block trains.
            passes: a gradient may pass through the block.
        """
        return self._replaced(block, _with_graph if not live and not passes else _with_grad)

    @contextmanager
    def _replaced(self, block: nn.Module, change: Callable[..., Any]) -> Iterator[None]:
        own = block.__dict__
        if _NAME not in own or not self.is_reentrant(block):
            yield
            return
        before = own[_NAME]
        own[_NAME] = partial(change, before)
        try:
            yield
        finally:
            own[_NAME] = before


def checkpoints(block: nn.Module) -> bool:
    """Whether a block's calls are checkpointed now."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def _turns_grad_off(function: Callable[..., Any]) -> bool:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x * 1

    try:
        with torch.enable_grad():
            function(look, torch.zeros(1, requires_grad=True))
    except Exception:
        return getattr(function, "keywords", {}).get("use_reentrant", True) is not False
    return bool(seen) and not seen[0]


def _with_graph(reentrant: Callable[..., Any], function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """Checkpoint without reentrance: no known part of the block trains, but a hook may add a trainable tensor."""
    return checkpoint(function, *args, use_reentrant=False)


def _with_grad(reentrant: Callable[..., Any], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Let one input require grad: otherwise reentrant checkpointing trains nothing, without an error."""
    floats = [index for index, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if floats and not any(args[index].requires_grad for index in floats) and _trains(function):
        first = floats[0]
        leaf = args[first].detach().requires_grad_()
        _made[leaf] = True
        args = (*args[:first], leaf, *args[first + 1 :])
    return reentrant(function, *args, **options)


def is_made(leaf: Tensor) -> bool:
    """Whether a bound block has created a leaf only for reentrant checkpointing; such a leaf trains nothing."""
    return leaf in _made


def _trains(function: Any) -> bool:
    """Whether the checkpointed module trains; True if the function does not show its module."""
    while isinstance(function, partial):
        owner = next((arg for arg in function.args if isinstance(arg, nn.Module)), None)
        function = function.func if owner is None else owner
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return trains(owner) if isinstance(owner, nn.Module) else True
