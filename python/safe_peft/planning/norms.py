"""What norms retain in a step: this depends on whether a layer that reads their output trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from safe_kernels.retention import Dropped, Save, storages

from .autograd_graph import Reach
from .retained import Saver


class Norms:
    """The norms that dropped their saved input, because a reader of their output was about to retain this output.

    Only norms drop a saved tensor while they are still part of the graph.

    Args:
        saves: the tensors that are retained at the end of the forward.
        dropped: the tensors that were saved, and then dropped.
        reach: the leaves that each node of the graph reaches.
        saver_of: returns the `Saver` for the note of a save.
        always: the bit of parameters that always train.
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
        """Return the `Saver` of a save: a norm saves its output while the reader runs, with the reader's note.

        Args:
            index: the index among the saves.
            save: the save.
        """
        if index not in self._own or save.made_by not in self._readers:
            return self._saver_of(save.note)
        return replace(self._saver_of(self._notes[save.made_by]), needs=self._readers[save.made_by], adapter=-1)

    def held(self) -> Iterator[tuple[int, int, Saver]]:
        """Yield what norms retain until a reader retains their output, and what they always retain.

        Yields:
            The id, the size and the `Saver` of each storage.
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
