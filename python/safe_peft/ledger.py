"""Who was scored when, and who was frozen when, with which score: the one truth about freezing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import jsonio
from .errors import StateError
from .report import Freezing, Scoring


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
        """Add a freezing, with the importance the adapter had at the latest scoring.

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
        if len(set(ledger.frozen)) != len(ledger.freezings):
            raise StateError("ledger.freezings: an adapter freezes once; the state is damaged, so save it again.")
        return ledger
