"""What a training did, as plain data: adapters, scorings, freezings, and what runs cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..planning.retained import MIB


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter: the name of its layer, and how many parameters it trains."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Scoring:
    """One scoring: the importance of every adapter scored after an optimizer step, and the threshold then, if any."""

    step: int
    threshold: float | None
    importance: dict[str, float]


@dataclass(frozen=True)
class Freezing:
    """One adapter frozen after an optimizer step, the importance it had and the threshold it did not exceed."""

    step: int
    name: str
    importance: float
    threshold: float | None


@dataclass(frozen=True)
class RunRecord:
    """What one training run gave and cost.

    Retained bytes and FLOPs are those of one step on a fixed batch, before the first and after the last training step.
    Seconds are those of the training steps alone, scoring and freezing included, evaluation and measuring not: on a CPU
    the processor's time in all threads, on a GPU the time by the clock.
    """

    method: str
    seed: int
    metric: str
    value: float
    eval_rows: int
    steps: int
    adapters: int
    frozen: int
    seconds: float
    peak_rss: int
    retained: tuple[tuple[int, int], ...]
    flops_start: int
    flops_end: int


class AdapterRow(NamedTuple):
    """An adapter's place among the rows of a table or a picture."""

    layer: int
    label: str
    name: str
    parameters: int


def mebibytes(size: float) -> float:
    """Convert bytes to MiB.

    Example:
        >>> mebibytes(2**20)
        1.0
    """
    return size / MIB if math.isfinite(size) else math.nan
