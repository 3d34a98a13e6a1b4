"""Times a provider and its competitor in turns, so that other load on the machine affects both."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

Run = Callable[[], Any]


def compare(
    benchmark: BenchmarkFixture,
    run: Run,
    competitor: Run,
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    **facts: Any,
) -> float:
    """Time `run`, with one run of `competitor` before every round.

    Args:
        benchmark: pytest-benchmark's fixture; it keeps the times of `run`.
        run: what is measured.
        competitor: what it is measured against.
        rounds: pairs of runs.
        clock: for `competitor`; that for `run` is pytest-benchmark's.
        facts: further figures to store with the times.

    Returns:
        The median over pairs of (time of run / time of competitor), kept as `ratio`; a provider compared with itself
        shows how far from 1 the noise of the machine reaches.
    """
    for _ in range(2):
        competitor()
        run()
    times: list[float] = []

    def timed_competitor() -> None:
        start = clock()
        competitor()
        times.append(clock() - start)

    benchmark.pedantic(run, setup=timed_competitor, rounds=rounds, iterations=1)
    ratio = median(own / other for own, other in zip(benchmark.stats.stats.data, times, strict=True))
    benchmark.extra_info |= {"ratio": ratio, "competitor_median": median(times), **facts}
    return ratio
