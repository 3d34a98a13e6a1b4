"""A whole training step of MiniLM with DoRA on every linear layer, ours compared with stock PEFT."""

from __future__ import annotations

import pytest
from comparison import compare
from minilm import Step, make_batch, make_model
from pytest_benchmark.fixture import BenchmarkFixture

import safe_peft
from safe_kernels import retention


@pytest.mark.parametrize("provider", ["peft", "safe"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_dora_step(benchmark: BenchmarkFixture, p: float, provider: str) -> None:
    batch = make_batch()
    steps = {name: Step(make_model(p, use_dora=True), batch) for name in ("peft", "safe")}
    safe_peft.bind(steps["safe"].model)
    losses = [float(step.forward().detach()) for step in steps.values()]
    assert p > 0.0 or abs(losses[1] / losses[0] - 1) < 1e-5
    retained = retention.measure(steps[provider].forward, exclude=steps[provider].model).bytes
    compare(benchmark, steps[provider], steps["peft"], rounds=8, retained_bytes=retained)
