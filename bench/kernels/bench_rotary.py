"""Rotary position embedding of queries and keys, forward and backward, compared with transformers' function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import safe_kernels
from safe_kernels import reference, retention

SHAPES = {"SmolLM2": (1, 256, 9, 3, 64), "d 512": (4, 256, 8, 8, 64)}  # batch, tokens, query heads, key heads, d


def safe(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return safe_kernels.rotary(q, cos, sin), safe_kernels.rotary(k, cos, sin)


@pytest.mark.parametrize("provider", ["peft", "reference", "safe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(benchmark: BenchmarkFixture, shape: str, dtype: torch.dtype, provider: str) -> None:
    batch, tokens, *heads, d = SHAPES[shape]
    torch.manual_seed(0)
    rows = [torch.randn(batch, tokens, count, d).to(dtype).requires_grad_() for count in heads]
    cos, sin = torch.randn(2, 1, tokens, d).to(dtype)
    grads = [torch.randn_like(x) for x in rows]

    def call(rotate: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        q, k = rotate(*(x.transpose(1, 2) for x in rows), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    def step(rotate: Callable[..., Any]) -> None:
        torch.autograd.grad(call(rotate), rows, grads)

    def reference_step() -> None:
        for x, grad in zip(rows, grads, strict=True):
            reference.rotary(x.detach(), cos, sin)
            reference.rotary(grad, cos, sin, transposed=True)

    functions = {"peft": apply_rotary_pos_emb, "safe": safe}
    runs = {name: partial(step, function) for name, function in functions.items()} | {"reference": reference_step}
    facts = {}
    if provider != "reference":
        facts["retained_bytes"] = retention.measure(lambda: call(functions[provider])).bytes
    compare(benchmark, runs[provider], runs["peft"], rounds=40, **facts)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(call(safe), call(apply_rotary_pos_emb), rtol=tolerance, atol=tolerance)
