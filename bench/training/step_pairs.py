"""A training step bound, compared with the same step of stock PEFT."""

from __future__ import annotations

from collections.abc import Callable

from comparison import compare
from minilm import Step
from pytest_benchmark.fixture import BenchmarkFixture

import safe_peft
from safe_kernels import retention


def compare_with_stock(
    benchmark: BenchmarkFixture, make: Callable[[], Step], provider: str, *, same_loss: bool
) -> None:
    """Time a step of "safe" (bound) or of "peft", compared with stock PEFT's; keep the bytes that its graph retains.

    Args:
        benchmark: pytest-benchmark's fixture.
        make: makes the step; the same one every time.
        provider: what is timed; "peft" shows the noise.
        same_loss: whether both losses must be equal, because nothing is dropped.
    """
    steps = {name: make() for name in ("peft", "safe")}
    safe_peft.bind(steps["safe"].model)
    losses = [float(step.forward().detach()) for step in steps.values()]
    assert not same_loss or abs(losses[1] / losses[0] - 1) < 1e-5
    retained = retention.measure(steps[provider].forward, exclude=steps[provider].model).bytes
    compare(benchmark, steps[provider], steps["peft"], rounds=6, retained_bytes=retained)
