"""Records of a training as plain data: adapters, scoring steps, freeze events, and costs of runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..planning.retained import MIB


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter: the name of its layer, and its number of trainable parameters."""

    name: str
    parameters: int


@dataclass(frozen=True)
class Scoring:
    """A scoring step: the importance of every scored adapter, and the threshold, if any."""

    step: int
    threshold: float | None
    importance: dict[str, float]


@dataclass(frozen=True)
class Freezing:
    """One frozen adapter: the step, its importance, and the threshold that it did not exceed."""

    step: int
    name: str
    importance: float
    threshold: float | None


@dataclass(frozen=True)
class RunRecord:
    """The result and the costs of one training run.

    Retained bytes and FLOPs are those of one step on a fixed batch, before the first and after the last training step.
    Seconds include training, scoring and freezing, but not evaluation and measuring. On a CPU they are the processor
    time of all threads, on a GPU the wall-clock time.
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
    """An adapter as a row of a table or a figure."""

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
