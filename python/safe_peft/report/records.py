"""Records of a training as plain data: adapters, scoring steps, freeze events, and costs of runs."""

from __future__ import annotations

from collections.abc import Sequence
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

    Retained bytes and FLOPs of a step are measured on a fixed batch: before the first training step, after each freeze
    event and after the last training step. `flops_run` is their sum over all steps, scoring included and skipped blocks
    excluded; 0 if unknown. `prefix_bytes` are the bytes of the outputs that were kept in order to skip blocks.
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
    flops_run: int = 0
    prefix_bytes: int = 0

    @property
    def retained_mean(self) -> float:
        """Retained bytes per step, the mean of all steps."""
        return total(self.retained, self.steps) / max(1, self.steps)


class AdapterRow(NamedTuple):
    """An adapter as a row of a table or a figure."""

    layer: int
    label: str
    name: str
    parameters: int


def total(costs: Sequence[tuple[int, int]], steps: int) -> int:
    """Sum a cost over the steps of a run, from pairs of (optimizer steps done, cost of each step from then on).

    Example:
        >>> total([(0, 10), (3, 5)], steps=4)
        35
    """
    ends = [step for step, _ in costs[1:]] + [steps]
    return sum((end - start) * cost for (start, cost), end in zip(costs, ends, strict=True))


def mebibytes(size: float) -> float:
    """Convert bytes to MiB."""
    return size / MIB
