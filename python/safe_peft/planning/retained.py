"""The storages that a step retains, as plain data: the modules that retain each, and what must freeze to free it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MIB = 2**20
Live = NDArray[np.bool_]
"""Which adapters are live: one bool per adapter, and a last one for parameters that always train."""
_EXACT = np.errstate(invalid="ignore")
"""All numbers here are 0 or 1, but a BLAS may raise the flag for numbers that it reads beyond the end of a matrix."""

PARTS = (
    *("attention", "MLP", "norms", "head and loss", "embeddings", "block", "recompute", "dropout"),
    *("LoRA dropout", "LoRA inputs"),
)
"""The parts of a step. A storage counts for the first part that retains it; parts that one adapter frees are last."""


@dataclass(frozen=True)
class Saver:
    """One module that retains a storage.

    Args:
        module: path of the module that was running.
        part: one of `PARTS`.
        block: index of its block, or -1.
        needs: bits of adapters; the storage is retained while one of them is live. The highest bit is for parameters
            that always train.
        adapter: index of the adapter that retains the storage for its own gradient, or -1.
        unless: bits of adapters; while one of them is live, the storage is not retained. A norm retains its input only
            if no trainable layer retains its output.
        also: bits of adapters; if there are any, one of them must be live too. Used for a norm that saves outside of
            its own block, because of a layer in another block.
    """

    module: str
    part: str
    block: int
    needs: int
    adapter: int = -1
    unless: int = 0
    also: int = 0


@dataclass(frozen=True)
class Storage:
    """The bytes and the savers of one storage. A block's input that is not retained yet has no savers."""

    bytes: int
    savers: tuple[Saver, ...]

    @cached_property
    def holders(self) -> tuple[Saver, ...]:
        """The savers that retain the storage while nothing more is frozen."""
        return tuple(saver for saver in self.savers if not saver.unless)


@dataclass(frozen=True)
class BlockFacts:
    """The data that decides about recomputing a block.

    Args:
        name: the block's path.
        holds: bits of the adapters in the block.
        passes: bits of the adapters for which a gradient passes through the block.
        inputs: indices of the storages of its arguments.
        random_state: bytes of random state that the block would have to retain.
        sample: bytes of the hidden states that it receives per sample.
    """

    name: str
    holds: int
    passes: int
    inputs: tuple[int, ...]
    random_state: int = 0
    sample: int = 0


class _Rows(NamedTuple):
    """All savers: one row per saver, with the savers of a storage next to each other."""

    needs: NDArray[np.float32]
    unless: NDArray[np.float32]
    also: NDArray[np.float32]
    blocks: NDArray[np.int64]
    starts: list[int]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class RetainedTable:
    """The bytes that a step retains, also with more adapters frozen or blocks recomputed.

    The prediction is exact except in one case, in which a step retains a little less: if nothing before an MLP's
    activation is live, the layer after the activation retains its own input instead of the activation's input.

    Args:
        adapters: names of the live adapters; their indices are their bits.
        blocks: lowest first.
        storages: each once.

    Example:
        >>> x = Storage(64, (Saver("q", "LoRA inputs", 0, 0b01, 0), Saver("v", "LoRA inputs", 0, 0b10, 1)))
        >>> table = RetainedTable(("q", "v"), (), (x,))
        >>> table.bytes(), table.bytes(frozen=["q"]), table.bytes(frozen=["q", "v"])
        (64, 64, 0)
    """

    adapters: tuple[str, ...]
    blocks: tuple[BlockFacts, ...]
    storages: tuple[Storage, ...]

    def live(self, frozen: Collection[str] = ()) -> Live:
        """Return which adapters are live if these are frozen; unknown names are ignored."""
        gone = set(frozen)
        return np.array([name not in gone for name in self.adapters] + [True])

    def bytes(self, frozen: Collection[str] = (), recompute: Collection[str] = ()) -> int:
        """Return the bytes a step would retain with further adapters frozen.

        The named blocks are recomputed in backward once nothing in them trains.
        """
        return int(self.bytes_of(self.live(frozen)[None], recompute)[0])

    @_EXACT
    def bytes_of(self, live: Live, recompute: Collection[str] = ()) -> NDArray[np.int64]:
        """Return [cases], the bytes that a step would retain, for `live` of shape [cases, adapters + 1]."""
        rows, columns = self._rows, live.T.astype(np.float32)
        again = self._recomputed(columns, recompute)
        held = (rows.needs @ columns > 0) & ~(rows.unless @ columns > 0) & ~again[rows.blocks]
        held &= (rows.also @ columns > 0) | ~rows.also.any(axis=1, keepdims=True)
        alive = np.logical_or.reduceat(held, rows.starts, axis=0) if rows.starts else held
        for number, block in enumerate(self.blocks):
            alive[list(block.inputs)] |= again[number]
        states = np.array([*(block.random_state for block in self.blocks), 0])
        return rows.sizes @ alive + states @ again

    def recomputed(self, frozen: Collection[str], recompute: Collection[str]) -> list[str]:
        """Return the blocks that would be recomputed: named in `recompute`, fully frozen, and a gradient passes."""
        again = self._recomputed(self.live(frozen)[:, None].astype(np.float32), recompute)
        return [block.name for block, runs in zip(self.blocks, again[:, 0], strict=False) if runs]

    @_EXACT
    def _recomputed(self, columns: NDArray[np.float32], recompute: Collection[str]) -> NDArray[np.bool_]:
        """Return [blocks + 1, cases]; the last row, with index -1, is for everything outside the blocks."""
        asked = set(recompute)
        again = np.zeros((len(self.blocks) + 1, columns.shape[1]), dtype=bool)
        if asked and self.blocks:
            holds, passes = (self._bits([getattr(block, n) for block in self.blocks]) for n in ("holds", "passes"))
            wanted = np.array([block.name in asked for block in self.blocks])[:, None]
            again[:-1] = wanted & (holds @ columns == 0) & (passes @ columns > 0)
        return again

    def _bits(self, masks: Sequence[int]) -> NDArray[np.float32]:
        """Return [masks, adapters + 1]."""
        width = len(self.adapters) + 1
        rows = [[mask >> bit & 1 for bit in range(width)] for mask in masks]
        return np.array(rows, dtype=np.float32).reshape(len(rows), width)

    @cached_property
    def _rows(self) -> _Rows:
        found: list[tuple[int, int, int, int]] = []
        starts: list[int] = []
        for storage in self.storages:
            starts.append(len(found))
            # A storage without savers needs a row too, for its place among the sums.
            savers = {(saver.needs, saver.unless, saver.also, saver.block) for saver in storage.savers}
            found += sorted(savers) or [(0, 0, 0, -1)]
        needs, unless, also = (self._bits([one[i] for one in found]) for i in range(3))
        blocks = np.array([one[-1] for one in found], dtype=np.int64)
        sizes = np.array([storage.bytes for storage in self.storages], dtype=np.int64)
        return _Rows(needs, unless, also, blocks, starts, sizes)

    def names(self, bits: int) -> list[str]:
        """Return the names of the adapters with these bits."""
        return [name for index, name in enumerate(self.adapters) if bits >> index & 1]

    def is_complete(self) -> bool:
        """Whether every adapter retains at least one storage."""
        needed = reduce(or_, (saver.needs for storage in self.storages for saver in storage.savers), 0)
        return len(self.names(needed)) == len(self.adapters)

    def compact(self) -> RetainedTable:
        """Return the same table with fewer storages: storages with the same savers become one, without module paths."""
        inputs = {index for block in self.blocks for index in block.inputs}
        together: dict[tuple[tuple[Saver, ...], int], int] = {}
        keys = []
        for index, storage in enumerate(self.storages):
            savers = tuple(sorted({replace(saver, module="") for saver in storage.savers}, key=repr))
            keys.append((savers, index if index in inputs else -1))
            together[keys[-1]] = together.get(keys[-1], 0) + storage.bytes
        places = {key: place for place, key in enumerate(together)}
        blocks = [replace(b, inputs=tuple(dict.fromkeys(places[keys[i]] for i in b.inputs))) for b in self.blocks]
        storages = tuple(Storage(size, savers) for (savers, _), size in together.items())
        return RetainedTable(self.adapters, tuple(blocks), storages)

    def joined(self, other: RetainedTable) -> RetainedTable:
        """Return the table of this forward and a later one of the same model, with one common backward."""
        count = len(self.storages)
        blocks = [
            replace(
                mine,
                passes=mine.passes | theirs.passes,
                inputs=(*mine.inputs, *(index + count for index in theirs.inputs)),
                random_state=mine.random_state + theirs.random_state,
            )
            for mine, theirs in zip(self.blocks, other.blocks, strict=True)
        ]
        return RetainedTable(self.adapters, tuple(blocks), (*self.storages, *other.storages))

    def groups(self) -> list[tuple[str, ...]]:
        """Return the activation groups: live adapters that read the same tensors. One member alone frees little."""
        first = list(range(len(self.adapters)))  # of each adapter, the first member of its group
        for storage in self.storages:
            readers = {first[saver.adapter] for saver in storage.savers if saver.adapter >= 0}
            if len(readers) > 1:
                lowest = min(readers)
                first = [lowest if index in readers else index for index in first]
        found: dict[int, list[str]] = {}
        for index, name in zip(first, self.adapters, strict=True):
            found.setdefault(index, []).append(name)
        return [tuple(names) for names in found.values()]

    def held_by(self, adapters: Iterable[str]) -> int:
        """Return the bytes that these adapters retain for their own gradients, even if others retain them too."""
        indices = {self.adapters.index(name) for name in adapters}
        return sum(s.bytes for s in self.storages if any(saver.adapter in indices for saver in s.savers))

    def by_part(self) -> dict[str, int]:
        """Return the bytes retained now by part, in the order of `PARTS`."""
        found = dict.fromkeys(PARTS, 0)
        for storage in self.storages:
            if storage.holders:
                found[min((saver.part for saver in storage.holders), key=PARTS.index)] += storage.bytes
        return {part: size for part, size in found.items() if size}

    def by_block(self, outside: str = "outside the blocks") -> dict[str, int]:
        """Return the bytes retained now by block; a storage belongs to the block of its first saver."""
        found = {block.name: 0 for block in self.blocks} | {outside: 0}
        for storage in self.storages:
            if storage.holders:
                block = storage.holders[0].block
                found[self.blocks[block].name if block >= 0 else outside] += storage.bytes
        return found


@dataclass(frozen=True)
class Measured:
    """A table that was measured from the training's own forwards, and the batch's `Inputs.elements`."""

    elements: int
    table: RetainedTable

    def of(self, elements: int) -> RetainedTable:
        """Return the table for a batch with this number of elements; for a larger batch, an estimate."""
        if elements <= self.elements:
            return self.table
        ratio = elements / self.elements
        larger = [replace(storage, bytes=round(storage.bytes * ratio)) for storage in self.table.storages]
        return replace(self.table, storages=tuple(larger))


def merged(*counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Combine several counts by name; a missing name counts as zero.

    Example:
        >>> merged({"a": 1}, {"a": 2, "b": 3})
        {'a': (1, 2), 'b': (0, 3)}
    """
    names = dict.fromkeys(name for count in counts for name in count)
    return {name: tuple(count.get(name, 0) for count in counts) for name in names}
