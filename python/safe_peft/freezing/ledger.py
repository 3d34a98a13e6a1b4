"""The record of scoring steps and freeze events, with scores. All other code reads freezing from here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from ..report.records import Freezing, Scoring


@dataclass
class Ledger:
    """The ordered record of scoring steps and freeze events. An adapter freezes once, permanently.

    Example:
        >>> ledger = Ledger()
        >>> ledger.record_scoring(5, {"a": 0.1, "b": 0.2})
        >>> ledger.record_freezing(6, "a", threshold=0.15)
        >>> ledger.frozen, ledger.freezings[0].importance
        (('a',), 0.1)
    """

    warmup_end: int | None = None
    scorings: list[Scoring] = field(default_factory=list)
    freezings: list[Freezing] = field(default_factory=list)

    def record_scoring(self, step: int, importance: Mapping[str, float], threshold: float | None = None) -> None:
        """Add a scoring step; importance is nan where it is unknown."""
        self.scorings.append(Scoring(step, threshold, dict(importance)))

    def record_freezing(self, step: int, name: str, threshold: float | None = None) -> None:
        """Record that an adapter froze, with its importance in the latest scoring step."""
        self.freezings.append(Freezing(step, name, self.importance.get(name, math.nan), threshold))

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen adapters, in the order in which they were frozen."""
        return tuple(freezing.name for freezing in self.freezings)

    @property
    def importance(self) -> dict[str, float]:
        """Importance by adapter name in the latest scoring step; empty before the first."""
        return self.scorings[-1].importance if self.scorings else {}

    @property
    def threshold(self) -> float | None:
        """The latest threshold, if there was one."""
        latest: list[Scoring | Freezing] = [*self.scorings[-1:], *self.freezings[-1:]]
        known = [event for event in latest if event.threshold is not None]
        return max(known, key=lambda event: event.step).threshold if known else None

    @property
    def last_step(self) -> int:
        """The step of the latest event; 0 without events."""
        events: list[Scoring | Freezing] = [*self.scorings, *self.freezings]
        return max([self.warmup_end or 0, *(event.step for event in events)])

    def order(self, names: Iterable[str]) -> None:
        """Sort importance in the model's order, which decides between equals: a Trainer sorts the names in its JSON."""
        place = list(names).index
        for index, scoring in enumerate(self.scorings):
            importance = {name: scoring.importance[name] for name in sorted(scoring.importance, key=place)}
            self.scorings[index] = replace(scoring, importance=importance)

    def metrics(self, step: int, adapters: int) -> dict[str, float]:
        """Return the current state as finite numbers named `safe/*`.

        Example:
            >>> Ledger().metrics(3, 12)
            {'safe/step': 3.0, 'safe/frozen': 0.0, 'safe/frozen_fraction': 0.0}
        """
        frozen = len(self.frozen)
        metrics = {"step": step, "frozen": frozen, "frozen_fraction": frozen / adapters}
        if self.threshold is not None:
            metrics["threshold"] = self.threshold
        if values := [value for value in self.importance.values() if math.isfinite(value)]:
            metrics |= {f"importance_{kind.__name__}": kind(values) for kind in (min, median, max)}
        return {f"safe/{name}": float(value) for name, value in metrics.items()}
