"""Whom to freeze, and when: what the schedule, the scores and the bytes say together, kept in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .byte_planner import Planner
from .config import SafeConfig
from .curves import way
from .ledger import Ledger
from .schedule import Schedule, choose, is_freezing_step, is_stable, rank


class Decisions:
    """Decides from what was measured, and remembers it. It touches neither the model nor the optimizer.

    Args:
        config: the options.
        schedule: their moments, in steps.
        planner: knows the bytes, for options that depend on them.
        adapters: how many there are to decide about.
        others_train: whether anything but them trains.
    """

    def __init__(
        self, config: SafeConfig, schedule: Schedule, planner: Planner, adapters: int, others_train: bool
    ) -> None:
        self.ledger = Ledger()
        self._config = config
        self._schedule = schedule
        self._planner = planner
        self._adapters = adapters
        self._others_train = others_train

    def record(self, step: int, importance: Mapping[str, float]) -> None:
        """Take in a scoring step.

        Args:
            step: optimizer steps done.
            importance: by adapter name; nan where it could not be told.
        """
        if self._is_warm(step) and is_stable(self.ledger.importance, importance, self._config.stable_change):
            self.ledger.warmup_end = step
        self.end_warmup(step)
        # A threshold of bytes says nothing before somebody freezes.
        by_bytes = self._config.target == "bytes" and self._planner.refused is None
        threshold = None if by_bytes else self._choose(step, importance)[1]
        self.ledger.record_scoring(step, importance, self.ledger.threshold if threshold is None else threshold)

    def end_warmup(self, step: int) -> None:
        """End warm-up at its last moment; before that a scoring step that shows importance at rest ends it."""
        if self._is_warm(step) and step >= self._schedule.max_warmup:
            self.ledger.warmup_end = step

    def due(self, step: int) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Decide whom to freeze after this step, and record it.

        Args:
            step: optimizer steps done.

        Returns:
            Their names, and the blocks that are to run again in backward from now on; None leaves those as they are.
        """
        if not is_freezing_step(self._schedule, self.ledger.warmup_end, step):
            return (), None
        names, threshold = self._choose(step, self.ledger.importance)
        more, recompute = self._meet_budget(step, names)
        thresholds = dict.fromkeys(names, threshold) | dict.fromkeys(more)
        for name, value in thresholds.items():
            self.ledger.record_freezing(step, name, value)
        return tuple(thresholds), recompute

    def _is_warm(self, step: int) -> bool:
        return self.ledger.warmup_end is None and step >= self._schedule.warmup

    def _share(self, step: int) -> float:
        start = self.ledger.warmup_end
        return 0.0 if start is None else way(self._config.curve, step, start, self._schedule.freeze_end)

    def _choose(self, step: int, importance: Mapping[str, float]) -> tuple[list[str], float | None]:
        """Whom the curve says to freeze now, and the threshold that says so."""
        if self.ledger.warmup_end is None:
            return [], None
        frozen, share = self.ledger.frozen, self._share(step)
        live = {name: importance[name] for name in importance if name not in frozen}
        if self._config.target == "bytes" and self._planner.acts():
            may = {name: live[name] for name in rank(self._config, live)}
            names = self._planner.by_bytes(may, frozen, share)
            threshold = max((live[name] for name in names), default=None)
        else:
            names, threshold = choose(self._config, live, adapters=self._adapters, frozen=len(frozen), share=share)
        if not self._others_train and len(frozen) + len(names) == self._adapters:
            names = names[:-1]  # a backward needs something that trains
        return names, threshold

    def _meet_budget(self, step: int, chosen: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Whom to freeze besides, so that the next steps stay within the budget, and which blocks to recompute."""
        if self._config.memory_budget is None:
            return (), None
        frozen, known = [*self.ledger.frozen, *chosen], self.ledger.importance
        live = {name: known[name] for name in rank(self._config, known) if name not in frozen}
        choice = self._planner.fit(live, frozen, self._share(step))
        return tuple(choice.freeze), tuple(choice.recompute)
