"""A whole training step of SmolLM2, ours beside stock PEFT with the same adapters frozen."""

from __future__ import annotations

import pytest
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from smollm2 import LAYERS, Step, make_batch, make_model, switch_off_frozen_dropout

import safe_peft
from safe_kernels import retention


@pytest.mark.parametrize(
    ("frozen", "p", "recompute"),
    [(0, 0.0, False), (0, 0.1, False), (LAYERS // 2, 0.0, False), (LAYERS // 2, 0.1, False)],
)
def test_smollm2_step(benchmark: BenchmarkFixture, frozen: int, p: float, recompute: bool) -> None:
    batch = make_batch(rows=2, length=256)
    stock, ours = Step(make_model(p, frozen), batch), Step(make_model(p, frozen), batch)
    safe_peft.bind(ours.model)
    switch_off_frozen_dropout(ours.model)
    retained = retention.measure(ours.forward).bytes
    compare(benchmark, ours, stock, rounds=5, retained_bytes=retained)
    if p == 0.0:
        assert ours.forward().item() == pytest.approx(stock.forward().item(), rel=1e-2)
