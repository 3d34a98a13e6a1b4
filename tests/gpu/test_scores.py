"""Dropout's mask and the scores of adapters: the same on a GPU as on a CPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import HALF, SINGLE, Normal, state
from gpu_checks import CPU

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks

pytestmark = pytest.mark.gpu
TOLERANCE = {SINGLE: 1e-4, HALF: 2e-2}
"""Of a score, relative; in bf16 the features are rounded before they are compared."""


def test_the_mask_of_one_seed_has_the_same_bits(device: torch.device) -> None:
    torch.manual_seed(0)
    x, seed = torch.ones(777, 1234), state()
    masks = [safe_kernels.dropout(x.to(where), 0.5, rng_state=seed.to(where)).cpu() for where in (CPU, device)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("op", ["lora", "lora_linear"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_an_adapter_has_the_same_score(op: str, p: float, dtype: torch.dtype, device: torch.device) -> None:
    on_cpu, here = (score(op, p, dtype, where) for where in (CPU, device))
    assert here == pytest.approx(on_cpu, rel=TOLERANCE[dtype], abs=0)


def score(op: str, p: float, dtype: torch.dtype, device: torch.device) -> float:
    """1 - CKA of one adapter."""
    torch.manual_seed(0)
    shapes = ((512, 256), 1.0), ((512, 300), 1.0), ((300, 256), 0.06), ((8, 256), 0.06), ((300, 8), 0.1)
    x, base, weight, A, B = (Normal(shape, dtype, scale).draw().to(device) for shape, scale in shapes)
    blocks = RowBlocks(torch.tensor([0, 200, 450]).to(device), 128, (torch.arange(512) % 7 != 0).to(device))
    statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64, device=device), blocks)
    options = {"dropout_p": p, "rng_state": state().to(device) if p else None, "statistics": statistics}
    if op == "lora_linear":
        safe_kernels.lora_linear(x, weight, None, A, B, 2.0, **options)
    else:
        safe_kernels.lora(x, base, A, B, 2.0, **options)
    return statistics.one_minus_cka()
