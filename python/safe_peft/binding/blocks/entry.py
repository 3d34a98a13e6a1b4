"""Where the gradient enters a model for nothing: `enable_input_require_grads` makes the embeddings' output a leaf.

Checkpointing set-ups switch that on so that some input requires grad. With a frozen prefix it builds the whole graph
below the lowest live adapter, which nothing needs. Only what that hook of transformers' (or PEFT's own) made a leaf may
be cut off, and only where the model itself called the embeddings: any other leaf is the user's.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.wrappers import walk
from ..adapters import peft_kind
from ..class_swap import STATE, Swapped, is_bound
from .trains import may_ask_for_gradient, modules_in, package_of, waits_for_gradient

_LEAF_MAKERS = ("make_inputs_require_grads", "make_inputs_require_grad")
_PACKAGES = ("transformers", "peft")


class SafeEmbedding(Swapped):
    """Input embeddings that note which leaves `enable_input_require_grads` made of their outputs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, hooks included."""
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        entry: Entry = self.__dict__[STATE]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not entry.running:
            return super().__call__(*args, **kwargs)
        with entry.noting(self):
            output = super().__call__(*args, **kwargs)
        entry.see(self, output)
        return output


class SafeOwner(Swapped):
    """A model that calls its input embeddings: what is called outside it is called by the user."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call."""
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        if torch.compiler.is_compiling() or self._gives_states_away(kwargs):
            return super().__call__(*args, **kwargs)
        entry: Entry = self.__dict__[STATE]
        entry.running += 1
        try:
            return super().__call__(*args, **kwargs)
        finally:
            entry.running -= 1

    def _gives_states_away(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the caller gets the embeddings' output as well, and may ask for its gradient."""
        by_default = getattr(getattr(self, "config", None), "output_hidden_states", False)
        return bool(kwargs.get("output_hidden_states", by_default))


@dataclass
class Entry:
    """The leaves that only checkpointing set-ups wanted, as long as they live.

    Attributes:
        running: how many calls of the model are under way.
        before: what a model computes with before its first block, such as a norm of the embeddings.
        after: all its other modules.
    """

    running: int = 0
    before: list[nn.Module] = field(default_factory=list, repr=False)
    after: list[nn.Module] = field(default_factory=list, repr=False)
    _leaves: list[weakref.ref[Tensor]] = field(default_factory=list)

    @contextmanager
    def noting(self, embeddings: nn.Module) -> Iterator[None]:
        """Note what the known hooks make a leaf while the embeddings are called."""
        hooks = embeddings._forward_hooks
        known = {key: hook for key, hook in hooks.items() if _makes_leaves(hook)}
        hooks.update({key: self._noted(hook) for key, hook in known.items()})
        try:
            yield
        finally:
            hooks.update({key: hook for key, hook in known.items() if key in hooks})

    def _noted(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def noted(module: nn.Module, args: Any, output: Any) -> Any:
            was = isinstance(output, Tensor) and not output.requires_grad
            result = hook(module, args, output)
            if was and output.is_leaf and output.requires_grad:
                self._leaves = [ref for ref in self._leaves if ref() is not None]
                self._leaves.append(weakref.ref(output))
            return result

        return noted

    def see(self, embeddings: nn.Module, output: Any) -> None:
        """Give a leaf back to the user where a hook of theirs may have kept it, to read its gradient."""
        leaves = [leaf for ref in self._leaves if (leaf := ref()) is not None]
        if not any(leaf is output for leaf in leaves):
            return  # a later hook has put another tensor in its place, as NEFTune's does
        others = [hook for hook in embeddings._forward_hooks.values() if not _makes_leaves(hook)]
        if others:
            self._leaves = [ref for ref in self._leaves if ref() is not output]

    def is_artificial(self, hidden: Tensor) -> bool:
        """Whether all that a tensor's gradient would reach are leaves that only checkpointing set-ups wanted.

        A trainable embedding, a prompt, or a tensor of the user's that requires grad is something else, and is reached.
        """
        if not hidden.requires_grad or _is_watched(hidden):
            return False
        # A hook on the embeddings is looked at when these are called.
        seen = [module for module in self.before if not isinstance(module, SafeEmbedding)]
        if waits_for_gradient(self.before) or may_ask_for_gradient(seen):
            return False
        known = [leaf for ref in self._leaves if (leaf := ref()) is not None and not _is_watched(leaf)]
        return bool(known) and all(any(leaf is one for one in known) for leaf in _leaves(hidden))


def _makes_leaves(hook: Any) -> bool:
    """Whether a hook is the one of `enable_input_require_grads`, or PEFT's of the same purpose."""
    return getattr(hook, "__name__", "") in _LEAF_MAKERS and package_of(hook) in _PACKAGES


def _is_watched(tensor: Tensor) -> bool:
    """Whether a gradient that reaches a tensor is asked for: hooks on it, or `retain_grad`."""
    return bool(tensor._backward_hooks) or (not tensor.is_leaf and tensor.retains_grad)


def _leaves(tensor: Tensor) -> Iterator[Any]:
    """The leaves that a tensor's gradient reaches; None for one that is not to be told."""
    if tensor.grad_fn is None:
        yield tensor
        return
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            yield getattr(node, "variable", None)
        stack += [following for following, _ in node.next_functions if following is not None]


def before_blocks(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that a model registers before its first block, less what holds the block."""
    inside = {id(module) for block in blocks for module in modules_in(block)}
    before = itertools.takewhile(lambda module: id(module) not in inside, (module for _, module in walk(model)))
    return [module for module in before if not any(id(child) in inside for child in modules_in(module))]


def input_embeddings(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules whose outputs `enable_input_require_grads` makes leaves, and the models that call them.

    Those with an adapter train, and are none.
    """
    found: dict[nn.Module, list[nn.Module]] = {}
    for _, module in walk(model):
        get: Any = getattr(type(module), "get_input_embeddings", None)  # PEFT's wrappers have no method of their own
        try:
            embeddings = get(module) if callable(get) else None
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embeddings, nn.Module) and peft_kind(embeddings) is None:
            found.setdefault(embeddings, []).append(module)
    return found
