"""The op alone, forward and backward, compared with PEFT's operations and with the reference."""

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

SHAPES = {  # rows, d_in, d_out, r
    "MiniLM-attention": (1024, 384, 384, 8),
    "MiniLM-up": (1024, 384, 1536, 8),
    "MiniLM-down": (1024, 1536, 384, 8),
    "MPNet-attention": (1024, 768, 768, 8),
    "SmolLM2-down": (1024, 1536, 576, 16),
}
SCALING = 2.0


class Case:
    """One adapter in the middle of a network: its input and its base have gradients."""

    def __init__(self, shape: str, frozen: bool, p: float) -> None:
        torch.manual_seed(0)
        rows, d_in, d_out, r = SHAPES[shape]
        self.frozen, self.p = frozen, p
        self.x = torch.randn(rows, d_in, requires_grad=True)
        self.base = torch.randn(rows, d_out, requires_grad=True)
        self.A = torch.nn.Parameter(torch.randn(r, d_in) / d_in**0.5, requires_grad=not frozen)
        self.B = torch.nn.Parameter(torch.randn(d_out, r), requires_grad=not frozen)
        self.grad = torch.randn(rows, d_out)

    def peft(self) -> Tensor:
        """Compute it as PEFT does; a frozen adapter's dropout stays on."""
        return self.base + F.linear(F.linear(F.dropout(self.x, self.p), self.A), self.B) * SCALING

    def safe(self) -> Tensor:
        """Compute with the op; the dropout of a frozen adapter is off."""
        return safe_kernels.lora(self.x, self.base, self.A, self.B, SCALING, dropout_p=0.0 if self.frozen else self.p)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Return a function that runs forward and backward."""

        def run() -> None:
            forward().backward(self.grad)
            self.x.grad = self.base.grad = self.A.grad = self.B.grad = None

        return run

    def reference_step(self) -> None:
        """Run the reference's forward and backward, which build no graph."""
        p = 0.0 if self.frozen else self.p
        tensors = [t.detach() for t in (self.x, self.base, self.A, self.B)]
        rng_state = safe_kernels.functional.draw_rng_state(self.x.device) if p else None
        reference.lora(*tensors, SCALING, p, rng_state)
        wanted = [True, not self.frozen, not self.frozen]
        reference.lora_backward(self.grad, tensors[0], *tensors[2:], SCALING, p, rng_state, wanted)


def check_equal(case: Case) -> None:
    """Check that the timed functions compute the same."""
    p, case.p = case.p, 0.0
    torch.testing.assert_close(case.safe(), case.peft(), rtol=1e-4, atol=1e-4)
    case.p = p


@pytest.mark.parametrize("provider", ["peft", "reference", "safe"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("state", ["trainable", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora(benchmark: BenchmarkFixture, shape: str, state: str, p: float, provider: str) -> None:
    case = Case(shape, state == "frozen", p)
    runs = {"peft": case.step(case.peft), "reference": case.reference_step, "safe": case.step(case.safe)}
    facts = {}
    if provider != "reference":
        facts["retained_bytes"] = retention.measure(getattr(case, provider), exclude=(case.A, case.B)).bytes
    compare(benchmark, runs[provider], runs["peft"], rounds=3 if provider == "reference" else 40, **facts)
    check_equal(case)
