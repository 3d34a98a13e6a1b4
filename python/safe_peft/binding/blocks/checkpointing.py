"""Activation checkpointing, switched on by transformers or by a model's own code, in a model with frozen blocks.

Reentrant checkpointing trains nothing, without an error, if no input requires grad. So checkpointing set-ups call
`enable_input_require_grads`, which makes the embeddings' output a leaf. With a frozen prefix, this leaf makes
autograd build the graph below the lowest live adapter, which is not needed. Only a leaf from this hook of transformers
(or PEFT) may be cut off, and only if the model itself called the embeddings. Any other leaf belongs to the user.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import WeakTensorKeyDictionary

from ...distributed.wrappers import walk
from ..adapters import peft_kind
from ..class_swap import STATE, SwappedModule, is_bound, package_of
from .trains import may_ask_for_gradient, modules_in, trains, waits_for_gradient

_NAME = "_gradient_checkpointing_func"
_LEAF_MAKERS = ("make_inputs_require_grads", "make_inputs_require_grad")
_PACKAGES = ("transformers", "peft")
_made = WeakTensorKeyDictionary()


class Checkpointing:
    """The kind of a block's checkpointing function; another function is checked again."""

    def __init__(self) -> None:
        self._function: Any = None
        self._reentrant = False

    @contextmanager
    def around(self, block: nn.Module, *, needs_grad: bool) -> Iterator[None]:
        """Let reentrant checkpointing in a block's call train what is in the block, or passes a gradient through it."""
        own = block.__dict__
        function = own.get(_NAME) if checkpoints(block) else None
        if function is not None and function is not self._function:
            self._function, self._reentrant = function, _turns_grad_off(function)
        if function is None or not self._reentrant:
            yield
            return
        own[_NAME] = partial(_with_grad if needs_grad else _with_graph, function)
        try:
            yield
        finally:
            own[_NAME] = function


def checkpoints(block: nn.Module) -> bool:
    """Whether a block's calls are checkpointed now."""
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def _turns_grad_off(function: Callable[..., Any]) -> bool:
    """Whether a function is reentrant: it first runs its argument with grad mode off. A trial call shows it."""
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


class SafeEmbedding(SwappedModule):
    """Input embeddings that record which of their outputs `enable_input_require_grads` made a leaf."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        entry: Entry = self.__dict__[STATE]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not entry.running:
            return super().__call__(*args, **kwargs)
        return entry.call(self, partial(super().__call__, *args, **kwargs))


class SafeOwner(SwappedModule):
    """A model that calls its input embeddings. A call of the embeddings outside of the model is the user's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        # The caller may get the embeddings' output too, and may need its gradient.
        by_default = getattr(getattr(self, "config", None), "output_hidden_states", False)
        if torch.compiler.is_compiling() or kwargs.get("output_hidden_states", by_default):
            return super().__call__(*args, **kwargs)
        entry: Entry = self.__dict__[STATE]
        entry.running += 1
        try:
            return super().__call__(*args, **kwargs)
        finally:
            entry.running -= 1


@dataclass
class Entry:
    """The live leaves that only checkpointing set-ups need."""

    running: int = 0
    """The number of calls of the model that are running."""
    before: list[nn.Module] = field(default_factory=list, repr=False)
    """The modules that a model calls before its first block, such as a norm of the embeddings."""
    after: list[nn.Module] = field(default_factory=list, repr=False)
    """All other modules of the model."""
    _leaves: list[weakref.ref[Tensor]] = field(default_factory=list)

    def call(self, embeddings: nn.Module, call: Callable[[], Any]) -> Any:
        """Call the embeddings, and record the leaves that the known hooks create."""
        hooks = embeddings._forward_hooks
        known = {key: hook for key, hook in hooks.items() if _makes_leaves(hook)}
        hooks.update({key: self._noted(hook) for key, hook in known.items()})
        try:
            output = call()
        finally:
            hooks.update({key: hook for key, hook in known.items() if key in hooks})
        if not all(map(_makes_leaves, hooks.values())):  # the user's hook may keep the leaf, to read its gradient
            self._leaves = [ref for ref in self._leaves if ref() is not output]
        return output

    def _noted(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def noted(module: nn.Module, args: Any, output: Any) -> Any:
            was = isinstance(output, Tensor) and not output.requires_grad
            result = hook(module, args, output)
            if was and output.is_leaf and output.requires_grad:
                self._leaves = [ref for ref in self._leaves if ref() is not None]
                self._leaves.append(weakref.ref(output))
            return result

        return noted

    def is_artificial(self, hidden: Tensor) -> bool:
        """Whether a tensor's gradient would reach only leaves that checkpointing set-ups created.

        A trainable embedding, a prompt, or a user's tensor that requires grad is another leaf, and must be reached.
        """
        if not hidden.requires_grad or _is_watched(hidden):
            return False
        # Hooks on the embeddings are checked when the embeddings are called.
        seen = [module for module in self.before if not isinstance(module, SafeEmbedding)]
        if waits_for_gradient(self.before) or may_ask_for_gradient(seen):
            return False
        known = [leaf for ref in self._leaves if (leaf := ref()) is not None and not _is_watched(leaf)]
        return bool(known) and all(any(leaf is one for one in known) for leaf in _leaves(hidden))


def _makes_leaves(hook: Any) -> bool:
    """Whether a hook is the one of `enable_input_require_grads`, or PEFT's hook for the same purpose."""
    return getattr(hook, "__name__", "") in _LEAF_MAKERS and package_of(hook) in _PACKAGES


def _is_watched(tensor: Tensor) -> bool:
    """Whether a tensor's gradient is needed: the tensor has hooks, or `retain_grad` was called."""
    return bool(tensor._backward_hooks) or (not tensor.is_leaf and tensor.retains_grad)


def _leaves(tensor: Tensor) -> Iterator[Any]:
    """Yield the leaves that a tensor's gradient reaches; None for a leaf that the graph does not show."""
    if tensor.grad_fn is None:
        yield tensor
        return
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        if (node := stack.pop()) not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions if following is not None]
            if not node.next_functions:
                yield getattr(node, "variable", None)


def before_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules that a model registers before its first block, without those that contain a block."""
    inside = {id(module) for block in blocks for module in modules_in(block)}
    before = itertools.takewhile(lambda module: id(module) not in inside, (module for _, module in walk(model)))
    return [module for module in before if not any(id(child) in inside for child in modules_in(module))]


def input_embeddings(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Return the modules whose outputs `enable_input_require_grads` makes leaves, and the models that call them.

    Embeddings with an adapter train, and are not included.
    """
    found: dict[nn.Module, list[nn.Module]] = {}
    for _, module in walk(model):
        get: Any = getattr(type(module), "get_input_embeddings", None)  # PEFT's wrappers forward attributes
        with suppress(NotImplementedError, AttributeError):
            embeddings = get(module) if callable(get) else None
            if isinstance(embeddings, nn.Module) and peft_kind(embeddings) is None:
                found.setdefault(embeddings, []).append(module)
    return found
