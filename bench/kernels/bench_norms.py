"""The norms, forward and backward, compared with those of stock models and with the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

import safe_kernels
from safe_kernels import reference, retention

SHAPES = {"MiniLM": (1024, 384), "MPNet": (1024, 768), "SmolLM2": (8192, 576)}  # rows, d
EPS = 1e-6


class Case:
    """One norm in the middle of a network: its input has a gradient, and a layer that trains reads its output."""

    def __init__(self, kind: str, shape: str, frozen: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        rows, d = SHAPES[shape]
        self.kind, self.frozen = kind, frozen
        self.x = torch.randn(rows, d).to(dtype).requires_grad_()
        self.weight = torch.nn.Parameter((0.5 + torch.rand(d)).to(dtype), requires_grad=not frozen)
        self.bias = torch.nn.Parameter(torch.randn(d).to(dtype), requires_grad=not frozen)
        self.grad = torch.randn(rows, d).to(dtype)

    def peft(self) -> Tensor:
        """Compute PyTorch's own LayerNorm, or RMSNorm as LlamaRMSNorm of transformers does."""
        if self.kind == "layer_norm":
            return F.layer_norm(self.x, self.x.shape[-1:], self.weight, self.bias, EPS)
        hidden = self.x.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * hidden.to(self.x.dtype)

    def safe(self) -> Tensor:
        """Compute with the op."""
        if self.kind == "layer_norm":
            return safe_kernels.layer_norm(self.x, self.weight, self.bias, EPS)
        return safe_kernels.rms_norm(self.x, self.weight, EPS)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Return a function that runs forward and backward."""

        def run() -> None:
            forward().backward(self.grad)
            self.x.grad = self.weight.grad = self.bias.grad = None

        return run

    def reference_step(self) -> None:
        """Run the reference's forward and backward, which build no graph."""
        x, weight, bias = (t.detach() for t in (self.x, self.weight, self.bias))
        trains = not self.frozen
        if self.kind == "layer_norm":
            out, mean, rstd = reference.layer_norm(x, weight, bias, EPS)
            retained = (x, weight, bias, mean) if trains else (out, weight, bias, None)
            reference.layer_norm_backward(self.grad, *retained, rstd, self.frozen, [True, trains, trains])
        else:
            out, rstd = reference.rms_norm(x, weight, EPS)
            retained = x if trains else out
            reference.rms_norm_backward(self.grad, retained, weight, rstd, 0.0, self.frozen, [True, trains])

    def retained_bytes(self, forward: Callable[[], Tensor]) -> int:
        """Return the retained bytes, with a layer after it that retains the output."""
        reader = torch.nn.Parameter(torch.randn(4, self.x.shape[-1]).to(self.x.dtype))
        return retention.measure(lambda: F.linear(forward(), reader), exclude=(reader, self.weight, self.bias)).bytes


@pytest.mark.parametrize("provider", ["peft", "reference", "safe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state", ["trainable", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norm(
    benchmark: BenchmarkFixture, kind: str, shape: str, state: str, dtype: torch.dtype, provider: str
) -> None:
    case = Case(kind, shape, state == "frozen", dtype)
    runs = {"peft": case.step(case.peft), "reference": case.reference_step, "safe": case.step(case.safe)}
    facts = {}
    if provider != "reference":
        facts["retained_bytes"] = case.retained_bytes(getattr(case, provider))
    compare(benchmark, runs[provider], runs["peft"], rounds=5 if provider == "reference" else 40, **facts)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(case.safe(), case.peft(), rtol=tolerance, atol=tolerance)
