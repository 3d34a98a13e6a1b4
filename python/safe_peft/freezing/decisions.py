"""Decides which adapters freeze and when, by schedule, scores and bytes, and records it in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .byte_planner import Planner
from .curves import curve_value
from .ledger import Ledger
from .schedule import Schedule, choose, is_freezing_step, is_stable, rank


class Decisions:
    """Decides from measurements, and records the decisions. It changes neither the model nor the optimizer."""

    def __init__(self, schedule: Schedule, planner: Planner, adapters: int) -> None:
        self.ledger = Ledger()
        self._config, self._schedule, self._planner, self._adapters = planner.config, schedule, planner, adapters

    def record(self, step: int, importance: Mapping[str, float]) -> None:
        """Record a scoring step; importance is nan where it is unknown."""
        if self._is_warm(step) and is_stable(self.ledger.importance, importance, self._config.stable_change):
            self.ledger.warmup_end = step
        self.end_warmup(step)
        # With a target of bytes there is no threshold before the first freeze event.
        by_bytes = self._config.by_bytes and self._planner.refused is None
        threshold = None if by_bytes else self._choose(step, importance)[1]
        self.ledger.record_scoring(step, importance, self.ledger.threshold if threshold is None else threshold)

    def end_warmup(self, step: int) -> None:
        """End warm-up at `max_warmup`; a scoring step with stable importance may end it earlier."""
        if self._is_warm(step) and step >= self._schedule.max_warmup:
            self.ledger.warmup_end = step

    def due(self, step: int) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Decide which adapters freeze after this step, and which blocks are recomputed: None changes nothing."""
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
        return 0.0 if start is None else curve_value(self._config.curve, step, start, self._schedule.freeze_end)

    def _choose(self, step: int, importance: Mapping[str, float]) -> tuple[list[str], float | None]:
        """Return the adapters to freeze now by the curve, and the threshold."""
        if self.ledger.warmup_end is None:
            return [], None
        frozen, share = self.ledger.frozen, self._share(step)
        live = {name: importance[name] for name in importance if name not in frozen}
        if self._config.by_bytes and self._planner.acts():
            may = {name: live[name] for name in rank(self._config, live)}
            earlier = self.ledger.scorings[-2].importance if len(self.ledger.scorings) > 1 else {}
            names = self._planner.by_bytes(may, frozen, share, earlier)
            threshold = max((live[name] for name in names), default=None)
        else:
            names, threshold = choose(self._config, live, adapters=self._adapters, frozen=len(frozen), share=share)
        if not self._planner.others_train and len(frozen) + len(names) == self._adapters:
            names = names[:-1]  # backward fails if no parameter trains
        return names, threshold

    def _meet_budget(self, step: int, chosen: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Return more adapters to freeze so that the next steps stay within the budget, and the blocks to recompute."""
        if self._config.memory_budget is None:
            return (), None
        frozen, known = [*self.ledger.frozen, *chosen], self.ledger.importance
        live = {name: known[name] for name in rank(self._config, known) if name not in frozen}
        choice = self._planner.fit(live, frozen, self._share(step))
        return tuple(choice.freeze), tuple(choice.recompute)
