"""Draws cases, makes failing ones simpler, and counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from case import WORDS, Case, sensible
from compare import run
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

DRAWN = tuple(name for name in WORDS if name not in ("family", "compiled", "seed", "spot", "high", "when", "layers"))
OFTEN = (*DRAWN, *("hook", "change", "calls", "trains") * 2)
QUIET = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
ONE_IN = 500
"""Compiled cases take half a minute."""


@st.composite
def cases(draw: Any, compiled: bool = False) -> Case:
    """Programs of a few words that are not plain; fewer are simpler."""
    words: dict[str, Any] = {"family": draw(st.sampled_from(WORDS["family"]))}
    for name in draw(st.lists(st.sampled_from(OFTEN), unique=True, min_size=1, max_size=7)):
        words[name] = draw(st.sampled_from(WORDS[name][1:]))
    if words.get("recompute"):  # of frozen blocks
        words["trains"] = draw(st.sampled_from(("bottom", "one", "alternate", "random", "embeddings", "top")))
        words["layers"] = draw(st.sampled_from(WORDS["layers"]))
    if "hook" in words or "change" in words:
        words |= {name: draw(st.sampled_from(WORDS[name])) for name in ("spot", "high", "when")}
    words["seed"] = draw(st.sampled_from(WORDS["seed"]))
    if compiled and draw(st.integers(1, ONE_IN)) == ONE_IN // 3:
        words["compiled"] = True
    return sensible(Case(**words))


@dataclass(frozen=True)
class Failure:
    """A case in which a bound model differs from stock PEFT.

    Args:
        case: the simplest found.
        wrong: in what.
    """

    case: Case
    wrong: tuple[str, ...]

    @property
    def kinds(self) -> frozenset[str]:
        """Errors, gradients, bytes and so on."""
        return frozenset(line.split(":")[0] for line in self.wrong)

    def covers(self, case: Case, kinds: frozenset[str]) -> bool:
        """Whether another failure is probably the same: its case has all the words of this one, and it fails alike."""
        return bool(self.kinds & kinds) and self.case.told().items() <= case.told().items()

    def __str__(self) -> str:
        return "\n".join([f"{self.case!r},", *(f"    # {line}" for line in self.wrong)])


def simplest(failure: Failure, check: Callable[[Case], list[str]] = run) -> Failure:
    """Make words plain for as long as it still fails in the same way.

    Args:
        failure: as it was drawn.
        check: says what is wrong with a case.
    """
    for case in failure.case.simpler():
        wrong = tuple(check(case))
        simpler = Failure(case, wrong)
        if wrong and simpler.kinds & failure.kinds:
            return simplest(simpler, check)
    return failure


@dataclass
class Figures:
    """What a search did."""

    ran: Counter[str] = field(default_factory=Counter)
    like: Counter[int] = field(default_factory=Counter)
    found: list[Failure] = field(default_factory=list)

    def add(self, case: Case, wrong: list[str]) -> Failure | None:
        """Count a case; returns a failure that is new."""
        self.ran[case.family] += 1
        failure = Failure(case, tuple(wrong))
        if not wrong:
            return None
        known = next((i for i, one in enumerate(self.found) if one.covers(case, failure.kinds)), None)
        if known is not None:
            self.like[known] += 1
            return None
        failure = simplest(failure)
        self.found.append(failure)
        return failure


def drawn(number: int) -> list[Case]:
    """Some cases; others for another number."""
    found: list[Case] = []

    @seed(number)
    @settings(QUIET, max_examples=40, phases=[Phase.generate])
    @given(cases(compiled=True))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return list(dict.fromkeys(found))


def search(until: float, number: int, starts: Callable[[Case], None]) -> Iterator[tuple[Case, Failure | None]]:
    """Draw and run cases until it is `until` o'clock.

    Args:
        until: as `time.time` counts.
        number: another number, other cases.
        starts: called with each case before it runs, which the process may not survive.
    """
    figures = Figures()
    for batch in count(number):
        for case in drawn(batch):
            if time.time() > until:
                return
            starts(case)
            yield case, figures.add(case, run(case))
