"""What norms hold in a step, which depends on whether a layer that reads their output trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from safe_kernels.retention import Dropped, Save, storages

from .graph import Reach
from .retained import Saver


def held_by_norms(
    saves: Sequence[Save], dropped: Sequence[Dropped], reach: Reach, saver_of: Callable[[Any], Saver], always: int
) -> Iterator[tuple[int, int, Saver]]:
    """What norms hold until a layer that trains holds their output, and what they hold in either case.

    Only a norm lets go of what it has saved while it is still part of the graph.

    Args:
        saves: what is held at the end of the forward.
        dropped: what was saved, and is not held.
        reach: of the graph.
        saver_of: who holds a save, by its note.
        always: the bit of what always trains.

    Returns:
        Identity and size of each storage, and who holds it.
    """
    readers: dict[int, int] = {}
    kept = {key for save in saves for key, _ in storages(save.tensor)}
    for save in saves:
        saver = saver_of(save.note)
        if saver.adapter >= 0 or not saver.needs & always:
            readers[save.made_by] = readers.get(save.made_by, 0) | saver.needs
    largest: dict[int, int] = {}
    for drop in dropped:
        largest[drop.note.node] = max(drop.bytes, largest.get(drop.note.node, 0))
    for drop in dropped:
        node = drop.note.node
        if node in reach.all and node in readers:
            key = drop.key if drop.storage() is not None else -id(drop.storage)
            stays = key in kept and drop.bytes < largest[node]  # a statistic that backward from the output needs too
            yield key, drop.bytes, replace(saver_of(drop.note), unless=0 if stays else readers[node])
