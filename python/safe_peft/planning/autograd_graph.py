"""Finds the trainable tensors that each node of an autograd graph passes a gradient to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def latest_node() -> int:
    """Return the sequence number of this thread's newest node: inside a pack hook, the node that saves the tensor.

    Example:
        >>> y = torch.ones(1, requires_grad=True).exp()
        >>> y.grad_fn._sequence_nr() == latest_node()
        True
    """
    return int(torch._C._autograd._get_sequence_nr()) - 1


_ALIASES = frozenset(
    f"{name}Backward0" for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Alias", "Detach", "ToCopy")
)
"""Nodes that only transpose, view or cast a parameter before the product that reads it."""


class Reach:
    """The leaves that every node of a graph reaches, as bits.

    Args:
        roots: nodes from which backward starts.
        bit: returns a leaf's bits.
        hidden: by a node's sequence number, the bits of the leaves of its block. They count for a block with reentrant
            checkpointing, because its graph is built only in backward.

    Example:
        >>> a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> y = (a * 2) * b
        >>> reach = Reach([y.grad_fn], lambda leaf: 1 if leaf is a else 2)
        >>> node = y.grad_fn._sequence_nr()
        >>> reach.all[node], reach.direct[node]
        (3, 2)
    """

    def __init__(
        self, roots: Iterable[Any], bit: Callable[[Tensor], int], hidden: Mapping[int, int] | None = None
    ) -> None:
        self._bit, self._hidden = bit, hidden or {}
        self._all: dict[Any, int] = {}
        self._aliases: dict[Any, int] = {}  # leaves, and nodes that only change the shape or dtype of one leaf
        self.direct: dict[int, int] = {}
        """By a node's sequence number, the leaves that it reads itself."""
        self.all: dict[int, int] = {}
        """By a node's sequence number, every leaf that it reaches."""
        for root in roots:
            self._visit(root)

    def _visit(self, root: Any) -> None:
        stack = [root]
        while stack:
            node = stack[-1]
            if node in self._all:
                stack.pop()
                continue
            following = [next_node for next_node, _ in node.next_functions if next_node is not None]
            waiting = [next_node for next_node in following if next_node not in self._all]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            self._finish(node, following)

    def _finish(self, node: Any, following: list[Any]) -> None:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            self._all[node] = self._aliases[node] = self._bit(leaf)
            return
        direct = everything = 0
        if node.name() == "CheckpointFunctionBackward":
            everything = self._hidden.get(node._sequence_nr(), 0)
        for other in following:
            everything |= self._all[other]
            direct |= self._aliases.get(other, 0)
        self._all[node] = everything
        if direct and len(following) == 1 and node.name() in _ALIASES:
            self._aliases[node] = direct
        self.direct[node._sequence_nr()], self.all[node._sequence_nr()] = direct, everything
