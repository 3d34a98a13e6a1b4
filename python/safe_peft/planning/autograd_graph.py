"""Reads an autograd graph: which trainable tensors a node passes a gradient to, and what its norms retain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from safe_kernels.retention import Dropped, Save, storages

from .retained import Saver

_ALIASES = frozenset(
    f"{name}Backward0" for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "Alias", "Detach", "ToCopy")
)
"""Nodes that only transpose, view or cast a parameter before the product that reads it."""


def latest_node() -> int:
    """Return the sequence number of this thread's newest node: inside a pack hook, the node that saves the tensor.

    Example:
        >>> y = torch.ones(1, requires_grad=True).exp()
        >>> y.grad_fn._sequence_nr() == latest_node()
        True
    """
    return int(torch._C._autograd._get_sequence_nr()) - 1


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
        stack = list(roots)
        while stack:
            following = [node for node, _ in stack[-1].next_functions if node is not None]
            if stack[-1] in self._all:
                stack.pop()
            elif waiting := [node for node in following if node not in self._all]:
                stack += waiting
            else:
                self._finish(stack.pop(), following)

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


class Norms:
    """The norms that dropped their saved input, because a reader of their output was about to retain this output.

    Only norms drop a saved tensor while they are still part of the graph. What they retain depends on whether a layer
    that reads their output trains. `saver_of` returns the `Saver` for the note of a save, and `always` is the bit of
    parameters that always train.
    """

    def __init__(
        self,
        saves: Sequence[Save],
        dropped: Sequence[Dropped],
        reach: Reach,
        saver_of: Callable[[Any], Saver],
        always: int,
    ) -> None:
        self._saver_of = saver_of
        self._dropped = [drop for drop in dropped if drop.note.node in reach.all]
        self._kept = {key for save in saves for key, _ in storages(save.tensor)}
        self._largest: dict[int, int] = {}
        self._notes: dict[int, Any] = {}
        for drop in self._dropped:
            node = drop.note.node
            self._notes.setdefault(node, drop.note)
            self._largest[node] = max(drop.bytes, self._largest.get(node, 0))
        self._own = self._outputs(saves)
        self._readers: dict[int, int] = {}
        self._blocks: dict[int, dict[int, int]] = {}
        for index, save in enumerate(saves):
            saver = saver_of(save.note)
            if index not in self._own and (saver.adapter >= 0 or not saver.needs & always):
                self._readers[save.made_by] = self._readers.get(save.made_by, 0) | saver.needs
                blocks = self._blocks.setdefault(save.made_by, {})
                blocks[saver.block] = blocks.get(saver.block, 0) | saver.needs

    def of(self, index: int, save: Save) -> Saver:
        """Return the `Saver` of a save; a norm saves its output while the reader runs, with the reader's note."""
        if index not in self._own or save.made_by not in self._readers:
            return self._saver_of(save.note)
        return replace(self._saver_of(self._notes[save.made_by]), needs=self._readers[save.made_by], adapter=-1)

    def held(self) -> Iterator[tuple[int, int, Saver]]:
        """Yield the identity, size and `Saver` of each storage that a norm dropped.

        A norm retains its input until a reader retains the output, and some statistics always.
        """
        for drop in self._dropped:
            node = drop.note.node
            if node in self._readers:
                saver, stays = self._saver_of(drop.note), self._is_statistic(drop) and self._key(drop) in self._kept
                yield self._key(drop), drop.bytes, saver if stays else replace(saver, unless=self._readers[node])
                # If the norm's own block is recomputed, a reader in another block makes the norm save outside of it.
                for block, needs in self._blocks[node].items() if stays else ():
                    if block != saver.block:
                        yield self._key(drop), drop.bytes, replace(saver, block=block, also=needs)

    def _outputs(self, saves: Sequence[Save]) -> set[int]:
        """Return the indices of the saves of the norms' own outputs; each is followed by its statistics."""
        statistics = {self._key(drop): drop.note.node for drop in self._dropped if self._is_statistic(drop)}
        latest: dict[int, int] = {}
        found: dict[int, int] = {}
        for index, save in enumerate(saves):
            if save.made_by in self._notes:
                latest[save.made_by] = index
            for key, _ in storages(save.tensor):
                node = statistics.get(key, -1)
                if node in latest:
                    found.setdefault(node, latest[node])
        return set(found.values())

    def _is_statistic(self, drop: Dropped) -> bool:
        """Whether a dropped tensor is a statistic, which backward from the output may need too."""
        return drop.bytes < self._largest[drop.note.node]

    @staticmethod
    def _key(drop: Dropped) -> int:
        return drop.key if drop.storage() is not None else -id(drop.storage)
