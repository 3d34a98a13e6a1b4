"""The last layer and its cross entropy, forward and backward: ours, whole logits, and PyTorch's own chunked op."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

import safe_kernels

TOKENS, CLASSES, D = 512, 49_152, 576  # SmolLM2's head


class Case:
    """One head and its rows, a share of which is ignored."""

    def __init__(self, ignored: float, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(TOKENS, D).to(dtype).requires_grad_()
        self.weight = (torch.randn(CLASSES, D) * D**-0.5).to(dtype)
        self.target = torch.randint(CLASSES, (TOKENS,)).where(torch.rand(TOKENS) >= ignored, -100)

    def whole(self) -> Tensor:
        """What transformers computes."""
        return F.cross_entropy(F.linear(self.x, self.weight).float(), self.target)

    def torch(self) -> Tensor:
        """PyTorch's op in chunks."""
        return F.linear_cross_entropy(self.x, self.weight, self.target, options=torch.nn.LinearCrossEntropyOptions())

    def safe(self) -> Tensor:
        """Ours."""
        losses = safe_kernels.linear_cross_entropy(self.x, self.weight, None, self.target)
        return losses.sum() / (self.target != -100).sum()

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward and backward."""

        def run() -> None:
            forward().backward()
            self.x.grad = None

        return run


def added_peak(run: Callable[[], None]) -> int:
    """Bytes by which a call raises the resident memory above what is there before it (Linux)."""
    run()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize("provider", ["whole", "torch", "safe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_linear_cross_entropy(benchmark: BenchmarkFixture, ignored: float, dtype: torch.dtype, provider: str) -> None:
    case = Case(ignored, dtype)
    if provider == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("PyTorch has no such op before 2.13")
    run = case.step(getattr(case, provider))
    facts = {"added_peak": added_peak(run)}
    compare(benchmark, run, case.step(case.whole), rounds=5, **facts)
    torch.testing.assert_close(case.safe(), case.whole(), rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0)
