"""A whole training step of SmolLM2, ours compared with stock PEFT with the same adapters frozen."""

from __future__ import annotations

import pytest
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from smollm2 import Step, make_batch, make_model, switch_off_frozen_dropout

import safe_peft
from safe_kernels import retention

CASES = [
    *((frozen, p, False) for frozen in ("none", "lower half") for p in (0.0, 0.1)),
    *(("all but the lowest", p, recompute) for p in (0.0, 0.1) for recompute in (False, True)),
]


@pytest.mark.parametrize(("frozen", "p", "recompute"), CASES)
def test_smollm2_step(benchmark: BenchmarkFixture, frozen: str, p: float, recompute: bool) -> None:
    batch = make_batch(rows=1, length=256)
    stock, ours = Step(make_model(p, frozen), batch), Step(make_model(p, frozen), batch)
    binding = safe_peft.bind(ours.model)
    binding.recompute.update(binding.blocks if recompute else ())
    switch_off_frozen_dropout(ours.model)
    retained, stock_bytes = (retention.measure(step.forward, exclude=step.model).bytes for step in (ours, stock))
    compare(benchmark, ours, stock, rounds=5, retained_bytes=retained, stock_bytes=stock_bytes)
    if p == 0.0:
        assert ours.forward().item() == pytest.approx(stock.forward().item(), rel=1e-2)
