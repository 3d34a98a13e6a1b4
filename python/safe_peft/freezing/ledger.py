"""Who was scored when, and who was frozen when, with which score: the one truth about freezing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from ..report.records import Freezing, Scoring


@dataclass
class Ledger:
    """The ordered record of scorings and freezings. An adapter freezes once, for good.

    Args:
        warmup_end: the step at which warm-up ended, or None before that.
        scorings: in the order of their steps.
        freezings: in the order in which they happened.

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
        """Add a scoring step.

        Args:
            step: optimizer steps done.
            importance: by adapter name; nan where it could not be told.
            threshold: the one in force, if any.
        """
        self.scorings.append(Scoring(step, threshold, dict(importance)))

    def record_freezing(self, step: int, name: str, threshold: float | None = None) -> None:
        """Add a freeze event, with the importance the adapter had at the latest scoring.

        Args:
            step: optimizer steps done.
            name: the adapter.
            threshold: the one it did not exceed, if any.
        """
        self.freezings.append(Freezing(step, name, self.importance.get(name, math.nan), threshold))

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen adapters, in the order in which they were frozen."""
        return tuple(freezing.name for freezing in self.freezings)

    @property
    def importance(self) -> dict[str, float]:
        """The latest scoring's importance by adapter name; empty before the first."""
        return self.scorings[-1].importance if self.scorings else {}

    @property
    def threshold(self) -> float | None:
        """The threshold that was in force latest, if there was any."""
        latest: list[Scoring | Freezing] = [*self.scorings[-1:], *self.freezings[-1:]]
        known = [event for event in latest if event.threshold is not None]
        return max(known, key=lambda event: event.step).threshold if known else None

    @property
    def last_step(self) -> int:
        """The latest step that anything here happened at; 0 if nothing did."""
        events: list[Scoring | Freezing] = [*self.scorings, *self.freezings]
        return max([self.warmup_end or 0, *(event.step for event in events)])

    def order(self, names: Iterable[str]) -> None:
        """Put importance in the model's order, which decides between equals; a Trainer sorts the names of its JSON.

        Args:
            names: all adapters, in the model's order.
        """
        place = {name: index for index, name in enumerate(names)}
        self.scorings = [
            replace(scoring, importance=dict(sorted(scoring.importance.items(), key=lambda item: place[item[0]])))
            for scoring in self.scorings
        ]

    def metrics(self, step: int, adapters: int) -> dict[str, float]:
        """Return where the method stands, as finite numbers named `safe/*`.

        Args:
            step: optimizer steps done.
            adapters: how many there are.

        Example:
            >>> Ledger().metrics(3, 12)
            {'safe/step': 3.0, 'safe/frozen': 0.0, 'safe/frozen_fraction': 0.0}
        """
        frozen = len(self.frozen)
        metrics = {"step": step, "frozen": frozen, "frozen_fraction": frozen / adapters}
        if self.threshold is not None:
            metrics["threshold"] = self.threshold
        values = [value for value in self.importance.values() if math.isfinite(value)]
        if values:
            metrics |= {
                "importance_min": min(values),
                "importance_median": median(values),
                "importance_max": max(values),
            }
        return {f"safe/{name}": float(value) for name, value in metrics.items()}
