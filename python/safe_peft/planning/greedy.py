"""Chooses what to freeze and what to recompute so that a step stays within a limit; pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .retained import RetainedTable


@dataclass(frozen=True)
class Choice:
    """Further adapters to freeze, blocks to recompute, the bytes that a step then retains, and whether they fit."""

    freeze: tuple[str, ...]
    recompute: tuple[str, ...]
    bytes: int
    fits: bool


def fit(
    table: RetainedTable,
    importance: Mapping[str, float],
    limit: int,
    *,
    frozen: Collection[str] = (),
    recompute: str = "off",
    keep_one: bool = False,
) -> Choice:
    """Freeze adapters with the least importance per byte, and recompute blocks, until a step fits into `limit` bytes.

    The search is greedy. It freezes sets of adapters that free memory: adapters that read the same tensors, a block, or
    all blocks up to a certain block, because the graph below the lowest live adapter is not built. With "auto", blocks
    are recomputed before more adapters freeze, because that costs only time. Only as many blocks are recomputed as the
    limit requires. Without recomputation the search runs again from every cut, with all blocks below the cut frozen.
    The result is the choice within the limit with the smallest sum of the importance of its frozen adapters.

    Args:
        table: what a step retains, with nothing or a part frozen.
        importance: of the adapters that may freeze; an adapter that is not in it, or is not finite, stays live.
        limit: bytes.
        frozen: adapters that are frozen already.
        recompute: "off", "frozen" (every frozen block that a gradient passes) or "auto" (as many as necessary).
        keep_one: whether one adapter must stay live, because nothing else trains.

    Returns:
        The choice. If it does not fit, every adapter that may freeze and would free memory is frozen.

    Example:
        >>> from safe_peft.planning.retained import Saver, Storage
        >>> hold = [Storage(64, (Saver(n, "LoRA inputs", -1, 1 << i, i),)) for i, n in enumerate("ab")]
        >>> fit(RetainedTable(("a", "b"), (), tuple(hold)), {"a": 0.2, "b": 0.1}, 100).freeze
        ('b',)
    """
    every = [] if recompute == "off" else [block.name for block in table.blocks]
    spans = [every, []] if recompute == "auto" else [every]
    searches = [_Search(table, importance, set(frozen), blocks, keep_one) for blocks in spans]

    def choice_of(freeze: Sequence[str]) -> Choice:
        gone = {*frozen, *freeze}
        again = table.recomputed(gone, every)
        if recompute == "auto":
            again = _as_few(table, gone, again, limit)
        size = table.bytes(gone, again)
        return Choice(tuple(freeze), tuple(again), size, size <= limit)

    def cost(choice: Choice) -> float:
        return math.fsum(max(0.0, importance[name]) for name in choice.freeze)

    def rank(choice: Choice) -> tuple[bool, float, int]:
        return not choice.fits, cost(choice), len(choice.recompute)

    best = min((choice_of(search.run(limit)) for search in searches), key=rank)
    if not best.fits:
        return best  # no cut can free more: every adapter that may freeze and frees memory is frozen
    for search in [one for one in searches if not one.blocks]:  # recomputation hardly gains from further cuts
        for below in search.cuts():
            best = min(best, choice_of(search.run(limit, below, most=cost(best))), key=rank)
    return best


def _as_few(table: RetainedTable, frozen: Collection[str], blocks: Sequence[str], limit: int) -> list[str]:
    """Return only as many of the blocks as the limit requires, those that free the most first."""
    plain = table.bytes(frozen)
    gains = {name: plain - table.bytes(frozen, [name]) for name in blocks}
    kept: list[str] = []
    for name in sorted(blocks, key=lambda name: -gains[name]):
        if table.bytes(frozen, kept) <= limit:
            break
        kept.append(name)
    return [name for name in blocks if name in kept]


def _least_cost(options: Sequence[tuple[float, int, list[str]]], excess: int) -> float:
    """Return an estimate of the lowest cost of freeing `excess` bytes, as if options could be taken in part."""
    spent = 0.0
    for cost, gain, _ in sorted(options, key=lambda option: option[0] / option[1]):
        if gain >= excess:
            return spent + cost * excess / gain
        spent, excess = spent + cost, excess - gain
    return math.inf


class _Search:
    """The greedy choice of adapters to freeze."""

    def __init__(
        self,
        table: RetainedTable,
        importance: Mapping[str, float],
        frozen: set[str],
        blocks: Collection[str],
        keep_one: bool,
    ) -> None:
        self.table, self.blocks, self.keep_one = table, blocks, keep_one
        self.costs = {name: max(0.0, value) for name, value in importance.items() if math.isfinite(value)}
        self.places = {name: index for index, name in enumerate(table.adapters)}
        self.live = self.at_start = table.live(frozen)
        wholes = [*table.groups(), *(table.names(block.holds) for block in table.blocks)]
        groups = [self._open(whole) for whole in wholes]
        prefixes = [self._open(table.adapters[:count]) for count in range(1, len(table.adapters) + 1)]
        self.above, self.sets = list(dict.fromkeys(groups)), list(dict.fromkeys([*groups, *prefixes]))

    def cuts(self) -> Iterator[list[str]]:
        """Yield, for each cut above a block, the adapters below it that may freeze; the lowest cut first."""
        for block in self.table.blocks:
            below = self._open(self.table.adapters[: block.holds.bit_length()])
            found = [name for name in below if self.at_start[self.places[name]]]
            if found and (len(found) < self.at_start[:-1].sum() or not self.keep_one):
                yield found

    def run(self, limit: int, below: Sequence[str] = (), most: float = math.inf) -> list[str]:
        """Return the names to freeze, in their order, beginning with `below`.

        The search ends when a step fits into the limit, or when its choice costs as much as the known one (`most`).
        """
        self.live, taken = self.at_start.copy(), list(below)
        self.live[[self.places[name] for name in below]] = False
        spent, best = sum(self.costs[name] for name in below), (math.inf, list[str]())
        excess = self._bytes(self.live) - limit
        sets = self.above if below else self.sets
        while excess > 0 and spent < most:
            options = self._options(sets)
            if not options:
                break
            enough = [(cost, names) for cost, gain, names in options if gain >= excess]
            if enough and spent + min(enough)[0] < best[0]:
                cost, names = min(enough)
                best = (spent + cost, [*taken, *names])
            if most < math.inf and spent + _least_cost(options, excess) >= most:
                break  # it will hardly become cheaper than the known choice
            cost, gain, names = min(options, key=lambda option: (option[0] / option[1], option[0], option[2]))
            taken += names
            spent += cost
            excess -= gain
            self.live[[self.places[name] for name in names]] = False
        return best[1] if best[1] and (excess > 0 or best[0] <= spent) else taken

    def _bytes(self, live: Any) -> int:
        return int(self.table.bytes_of(live[None], self.blocks)[0])

    def _options(self, sets: Sequence[Sequence[str]]) -> list[tuple[float, int, list[str]]]:
        """Return cost, gain and names of every set that still frees memory."""
        lives, names = [], []
        for members in sets:
            open_members = [name for name in members if self.live[self.places[name]]]
            live = self.live.copy()
            live[[self.places[name] for name in open_members]] = False
            if open_members and (live[:-1].any() or not self.keep_one):
                lives.append(live)
                names.append(open_members)
        if not lives:
            return []
        gains = self._bytes(self.live) - self.table.bytes_of(np.array(lives), self.blocks)
        costs = [sum(self.costs[name] for name in members) for members in names]
        return [(cost, int(gain), n) for cost, gain, n in zip(costs, gains, names, strict=True) if gain > 0]

    def _open(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in names if name in self.costs)


def bytes_limit(full: int, budget: int, share: float) -> int:
    """Return the limit in bytes between the bytes of an unfrozen step and the budget, at a share of the way.

    Example:
        >>> bytes_limit(1000, 400, 0.5), bytes_limit(300, 400, 0.5)
        (700, 400)
    """
    return budget if full <= budget else full - math.floor((full - budget) * share)
