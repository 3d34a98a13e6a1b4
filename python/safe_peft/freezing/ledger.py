"""Who was scored when, and who was frozen when, with which score: the one truth about freezing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from ..errors import StateError
from ..files import jsonio
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
        """Add a scoring.

        Args:
            step: optimizer steps done.
            importance: by adapter name; nan where it could not be told.
            threshold: the one in force, if any.

        Raises:
            StateError: `step` lies before an earlier scoring.
        """
        if self.scorings and step < self.scorings[-1].step:
            raise StateError(f"scoring at step {step} comes after one at step {self.scorings[-1].step}.")
        self.scorings.append(Scoring(step, threshold, dict(importance)))

    def record_freezing(self, step: int, name: str, threshold: float | None = None) -> None:
        """Add a freeze event, with the importance the adapter had at the latest scoring.

        Args:
            step: optimizer steps done.
            name: the adapter.
            threshold: the one it did not exceed, if any.

        Raises:
            StateError: The adapter is frozen already.
        """
        if name in self.frozen:
            raise StateError(f"adapter {name!r} is frozen already; an adapter freezes once.")
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

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that was scored or frozen."""
        scored = [name for scoring in self.scorings for name in scoring.importance]
        return tuple(dict.fromkeys([*scored, *self.frozen]))

    def order(self, names: Iterable[str]) -> None:
        """Put importance in the model's order, which decides between equals, and which a JSON file need not keep.

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

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values; an importance that is not finite becomes null.

        Example:
            >>> Ledger.from_dict(Ledger(warmup_end=3).to_dict()).warmup_end
            3
        """
        return {
            "warmup_end": self.warmup_end,
            "scorings": jsonio.encode(self.scorings),
            "freezings": jsonio.encode(self.freezings),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Ledger:
        """Read what `to_dict` wrote.

        Args:
            data: the JSON values.

        Raises:
            StateError: A part is missing, of the wrong type, or contradicts another.
        """
        if not isinstance(data, dict) or data.keys() != {"warmup_end", "scorings", "freezings"}:
            raise StateError(
                "ledger: expected warmup_end, scorings and freezings; the state is damaged, so save it again."
            )
        ledger = cls(
            jsonio.decode(int | None, data["warmup_end"], "ledger.warmup_end"),
            list(jsonio.decode(tuple[Scoring, ...], data["scorings"], "ledger.scorings")),
            list(jsonio.decode(tuple[Freezing, ...], data["freezings"], "ledger.freezings")),
        )
        ledger._check()
        return ledger

    def _check(self) -> None:
        """Refuse what contradicts itself: every freezing follows from the scoring before it."""
        steps = [[scoring.step for scoring in self.scorings], [freezing.step for freezing in self.freezings]]
        start = self.warmup_end if self.freezings else 0
        for holds, what in (
            (len(set(self.frozen)) == len(self.freezings), "freezings: an adapter freezes once"),
            (all(row == sorted(row) for row in steps), "steps must not go back"),
            (all(step > 0 for row in steps for step in row), "steps begin at 1"),
            (self.warmup_end is None or self.warmup_end >= 0, "warmup_end: expected a step"),
            (start is not None and all(step >= start for step in steps[1]), "freezings: none comes before warmup_end"),
            (all(self._follows(freezing) for freezing in self.freezings), "freezings: one follows from no scoring"),
        ):
            if not holds:
                raise StateError(f"ledger.{what}; the state is damaged, so use an older one.")

    def _follows(self, freezing: Freezing) -> bool:
        before = [scoring for scoring in self.scorings if scoring.step <= freezing.step]
        return bool(before) and before[-1].importance.get(freezing.name) == freezing.importance
