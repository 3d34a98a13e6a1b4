"""What a training forward retains, ours and stock PEFT: with the same adapters frozen, and with nothing frozen."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import FROZEN, MODELS, make_batch, make_model, switch_off_frozen_dropout
from torch import Tensor, nn

import safe_peft
from safe_kernels import retention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [
    *(("llama", "fp32", p, frozen, again) for p in (0.0, 0.1) for frozen in FROZEN for again in (False, True)),
    *(("llama", "bf16", p, "nothing", False) for p in (0.0, 0.1)),
    *((shape, "fp32", p, "nothing", False) for shape in MODELS if shape != "llama" for p in (0.0, 0.1)),
]
CASES = [case for case in CASES if not case[4] or case[3] == "every other block"]


def retained(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes, parameters and inputs aside."""
    return retention.measure(lambda: model(**batch).loss, exclude=[model, *batch.values()]).bytes


@pytest.mark.parametrize(("shape", "dtype", "p", "frozen", "recompute"), CASES)
def test_retention(benchmark: BenchmarkFixture, shape: str, dtype: str, p: float, frozen: str, recompute: bool) -> None:
    batch = make_batch(shape, DTYPES[dtype])
    stock_nothing = retained(make_model(shape, p, "nothing", DTYPES[dtype]), batch)
    stock_same = retained(make_model(shape, p, frozen, DTYPES[dtype]), batch)
    model = make_model(shape, p, frozen, DTYPES[dtype])
    binding = safe_peft.bind(model)
    switch_off_frozen_dropout(model)
    if recompute:
        binding.recompute.update(binding.blocks)
    ours = benchmark.pedantic(retained, args=(model, batch), rounds=1, iterations=1)
    benchmark.extra_info |= {
        "retained_bytes": ours,
        "stock_same_bytes": stock_same,
        "stock_nothing_bytes": stock_nothing,
        "ratio_same": ours / stock_same,
        "ratio_nothing": ours / stock_nothing,
    }
