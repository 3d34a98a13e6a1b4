"""A training step of a small model of each family of docs/adapters.md, ours compared with stock PEFT.

The models are those of tests/support/adapter_families.py, with 384 features instead of 32: 2 blocks, 64 x 12 tokens.
*half* means that the lower half of the adapters is frozen, on both sides. Dropout is in the model and in the adapters.
"""

from __future__ import annotations

import pytest
import tiny
from adapter_families import FAMILIES, AdapterFamily, freeze_half
from comparison import compare
from minilm import Step
from pytest_benchmark.fixture import BenchmarkFixture

import safe_peft
from safe_kernels import retention

WIDTH, ROWS = 384, 64
OTHERS = ("convolutions", "embeddings", "target_parameters")
"""Words of the families whose models do not grow with `tiny.WIDTH`; bench_conv and bench_experts measure two."""
MEASURED = {one.name: one for one in FAMILIES if not any(word in one.name for word in OTHERS)}
NOISE = "noise: stock PEFT compared with itself"


def make_step(one: AdapterFamily, frozen: str) -> Step:
    model = one.make()
    if frozen == "half":
        freeze_half(model)
    return Step(model, next(one.data(1, rows=ROWS)))


@pytest.mark.parametrize(("p", "frozen"), [(0.0, "nothing"), (0.1, "nothing"), (0.1, "half")])
@pytest.mark.parametrize("family", [*MEASURED, NOISE])
def test_family_step(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, family: str, p: float, frozen: str
) -> None:
    monkeypatch.setattr(tiny, "WIDTH", WIDTH)
    monkeypatch.setattr(tiny, "DROPOUT", p)
    stock, ours = (make_step(MEASURED.get(family, FAMILIES[0]), frozen) for _ in range(2))
    if family != NOISE:
        safe_peft.bind(ours.model)
    losses = [float(step.forward().detach()) for step in (stock, ours)]
    assert p > 0.0 or abs(losses[1] / losses[0] - 1) < 1e-5
    limit, retained = (retention.measure(step.forward, exclude=step.model).bytes for step in (stock, ours))
    compare(benchmark, ours, stock, rounds=12, retained_bytes=retained, stock_bytes=limit)
