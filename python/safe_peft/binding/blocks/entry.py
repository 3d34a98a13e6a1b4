"""Removes a graph that nothing needs: `enable_input_require_grads` makes the embeddings' output a leaf.

Checkpointing set-ups call it so that some input requires grad. With a frozen prefix it builds the whole graph below the
lowest live adapter, which nothing needs. Only a leaf from this hook of transformers (or PEFT) may be cut off, and only
if the model itself called the embeddings. Any other leaf belongs to the user.
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
from ..class_swap import STATE, SwappedModule, is_bound
from .trains import may_ask_for_gradient, modules_in, package_of, waits_for_gradient

_LEAF_MAKERS = ("make_inputs_require_grads", "make_inputs_require_grad")
_PACKAGES = ("transformers", "peft")


class SafeEmbedding(SwappedModule):
    """Input embeddings that record which of their outputs `enable_input_require_grads` made a leaf."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the module's own call, with its hooks."""
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        entry: Entry = self.__dict__[STATE]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not entry.running:
            return super().__call__(*args, **kwargs)
        with entry.noting(self):
            output = super().__call__(*args, **kwargs)
        entry.see(self, output)
        return output


class SafeOwner(SwappedModule):
    """A model that calls its input embeddings. A call of the embeddings outside of the model is the user's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make the module's own call."""
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
        """Whether the caller gets the embeddings' output too, and may need its gradient."""
        by_default = getattr(getattr(self, "config", None), "output_hidden_states", False)
        return bool(kwargs.get("output_hidden_states", by_default))


@dataclass
class Entry:
    """The live leaves that only checkpointing set-ups need.

    Attributes:
        running: the number of calls of the model that are running.
        before: the modules that a model calls before its first block, such as a norm of the embeddings.
        after: all other modules of the model.
    """

    running: int = 0
    before: list[nn.Module] = field(default_factory=list, repr=False)
    after: list[nn.Module] = field(default_factory=list, repr=False)
    _leaves: list[weakref.ref[Tensor]] = field(default_factory=list)

    @contextmanager
    def noting(self, embeddings: nn.Module) -> Iterator[None]:
        """Record the leaves that the known hooks create while the embeddings are called."""
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
        """Leave a leaf uncut if a hook of the user may have kept it, to read its gradient."""
        leaves = [leaf for ref in self._leaves if (leaf := ref()) is not None]
        if not any(leaf is output for leaf in leaves):
            return  # a later hook has replaced it by another tensor, as NEFTune's does
        others = [hook for hook in embeddings._forward_hooks.values() if not _makes_leaves(hook)]
        if others:
            self._leaves = [ref for ref in self._leaves if ref() is not output]

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
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not node.next_functions:
            yield getattr(node, "variable", None)
        stack += [following for following, _ in node.next_functions if following is not None]


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
        try:
            embeddings = get(module) if callable(get) else None
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(embeddings, nn.Module) and peft_kind(embeddings) is None:
            found.setdefault(embeddings, []).append(module)
    return found
