"""What a step retains, as plain data: every storage, who holds it, and what would have to freeze for it to go.

Adapters are bits of an int, so that "does anything live hold this?" is one operation; a plan asks it millions of times.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

PARTS = (
    "attention",
    "MLP",
    "norms",
    "head and loss",
    "embeddings",
    "block",
    "recompute",
    "dropout",
    "LoRA dropout",
    "LoRA inputs",
)
"""What keeps a storage; of several, the first: what freezing an adapter frees by itself stands last."""


@dataclass(frozen=True)
class Saver:
    """One module's hold on a storage.

    Args:
        module: path of the module that was running.
        part: one of `PARTS`.
        block: index of its block, or -1.
        needs: bits of the adapters any of which keeps the hold; the bit above all adapters is for what always trains.
        adapter: index of the adapter that holds it for its own gradient, or -1.
    """

    module: str
    part: str
    block: int
    needs: int
    adapter: int = -1


@dataclass(frozen=True)
class Storage:
    """Bytes that somebody may hold; without savers they are a block's input that nobody holds yet."""

    bytes: int
    savers: tuple[Saver, ...]

    @cached_property
    def part(self) -> str:
        """What keeps it, in one word."""
        return min((saver.part for saver in self.savers), key=PARTS.index)

    @property
    def block(self) -> int:
        """The block that made its first holder."""
        return self.savers[0].block


@dataclass(frozen=True)
class BlockFacts:
    """What it takes to run a block again in backward.

    Args:
        name: its path.
        holds: bits of what trains in it.
        passes: bits of what makes a gradient pass through it.
        inputs: indices of the storages of its arguments.
        random_state: bytes of random state it would have to keep.
    """

    name: str
    holds: int
    passes: int
    inputs: tuple[int, ...]
    random_state: int = 0


@dataclass(frozen=True)
class RetainedTable:
    """Everything a step retains, and what it would retain with more adapters frozen or blocks recomputed.

    Args:
        adapters: names of the live adapters; their places are their bits.
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

    def mask(self, frozen: Collection[str] = ()) -> int:
        """Return the bits of what lives when these are frozen; names of others are passed over."""
        everything = (1 << len(self.adapters) + 1) - 1
        gone = sum(1 << index for index, name in enumerate(self.adapters) if name in frozen)
        return everything & ~gone

    def bytes(self, frozen: Collection[str] = (), recompute: Collection[str] = ()) -> int:
        """Return the bytes a step would retain.

        Args:
            frozen: names of further adapters to freeze.
            recompute: names of the blocks that run again in backward once nothing in them trains.
        """
        return self.bytes_of(self.mask(frozen), recompute)

    def bytes_of(self, live: int, recompute: Collection[str] = ()) -> int:
        """Return the same for the bits of what lives."""
        again = self.recomputed(live, recompute)
        if not again:
            return sum(size for size, needs, _ in self._flat if needs & live)
        kept = {index for number in again for index in self.blocks[number].inputs}
        total = sum(self.blocks[number].random_state for number in again)
        for index, (size, needs, holds) in enumerate(self._flat):
            if index in kept or (needs & live and any(n & live and block not in again for n, block in holds)):
                total += size
        return total

    @cached_property
    def _flat(self) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """Size, all needs at once, and (needs, block) of every saver, by storage."""
        found = []
        for storage in self.storages:
            holds = tuple({(saver.needs, saver.block) for saver in storage.savers})
            needs = 0
            for need, _ in holds:
                needs |= need
            found.append((storage.bytes, needs, holds))
        return found

    def recomputed(self, live: int, recompute: Collection[str]) -> set[int]:
        """Return the indices of the blocks that would run again: asked to, wholly frozen, and a gradient passes."""
        return {
            number
            for number, block in enumerate(self.blocks)
            if block.name in recompute and not block.holds & live and block.passes & live
        }

    def groups(self) -> list[tuple[str, ...]]:
        """Return the live adapters in groups that read the same tensors: its members free little one by one."""
        leader = list(range(len(self.adapters)))

        def find(index: int) -> int:
            while leader[index] != index:
                index = leader[index]
            return index

        for storage in self.storages:
            readers = sorted({saver.adapter for saver in storage.savers if saver.adapter >= 0})
            for reader in readers[1:]:
                first, second = sorted((find(readers[0]), find(reader)))
                leader[second] = first
        found: dict[int, list[str]] = {}
        for index, name in enumerate(self.adapters):
            found.setdefault(find(index), []).append(name)
        return [tuple(names) for names in found.values()]

    def held_by(self, adapters: Iterable[str]) -> int:
        """Return the bytes that these adapters hold for their own gradients, whoever else holds them."""
        indices = {self.adapters.index(name) for name in adapters}
        return sum(s.bytes for s in self.storages if any(saver.adapter in indices for saver in s.savers))

    def by_part(self) -> dict[str, int]:
        """Return the bytes retained now by what keeps them, in the order of `PARTS`."""
        found = dict.fromkeys(PARTS, 0)
        for storage in self.storages:
            if storage.savers:
                found[storage.part] += storage.bytes
        return {part: size for part, size in found.items() if size}

    def by_block(self, outside: str = "outside the blocks") -> dict[str, int]:
        """Return the bytes retained now by block; a storage belongs to the block that held it first."""
        found = {block.name: 0 for block in self.blocks} | {outside: 0}
        for storage in self.storages:
            if storage.savers:
                found[self.blocks[storage.block].name if storage.block >= 0 else outside] += storage.bytes
        return found


def merged(*counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Lay several counts side by side, zero where one lacks a name.

    Example:
        >>> merged({"a": 1}, {"a": 2, "b": 3})
        {'a': (1, 2), 'b': (0, 3)}
    """
    names = dict.fromkeys(name for count in counts for name in count)
    return {name: tuple(count.get(name, 0) for count in counts) for name in names}
