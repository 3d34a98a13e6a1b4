"""The activations and dropout, forward and backward, compared with PyTorch's own functions and the references."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

import safe_kernels
from safe_kernels import reference, retention

SHAPES = {  # rows, features
    "MiniLM-hidden": (1024, 384),
    "MiniLM-up": (1024, 1536),
    "SmolLM2-up": (1024, 1408),
}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class Case:
    """One op in the middle of a network; with kind None it is only dropout."""

    def __init__(self, shape: str, kind: str | None, gated: bool, p: float) -> None:
        torch.manual_seed(0)
        self.kind, self.p = kind, p
        self.inputs = [torch.randn(SHAPES[shape], requires_grad=True) for _ in range(2 if gated else 1)]
        self.grad = torch.randn(SHAPES[shape])

    def peft(self) -> Tensor:
        """Compute as transformers does, with nn.Dropout after it if there is dropout."""
        out = self.inputs[0] if self.kind is None else ACTIVATIONS[self.kind](self.inputs[0])
        for up in self.inputs[1:]:
            out = out * up
        return F.dropout(out, self.p) if self.p else out

    def safe(self) -> Tensor:
        if self.kind is None:
            return safe_kernels.dropout(self.inputs[0], self.p)
        op = safe_kernels.activation if len(self.inputs) == 1 else safe_kernels.gated_activation
        return op(*self.inputs, self.kind, dropout_p=self.p)

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], None]:
        """Return a function that runs forward and backward."""

        def run() -> None:
            forward().backward(self.grad)
            for tensor in self.inputs:
                tensor.grad = None

        return run

    def reference_step(self) -> None:
        """Run the reference's forward and backward, which build no graph."""
        tensors = [tensor.detach() for tensor in self.inputs]
        state = safe_kernels.functional.draw_rng_state(self.grad.device)
        if self.kind is None:
            reference.dropout(*tensors, self.p, state)
            reference.dropout(self.grad, self.p, state)
        elif len(tensors) == 1:
            reference.activation(*tensors, self.kind, self.p, state)
            reference.activation_backward(self.grad, *tensors, self.kind, self.p, state)
        else:
            reference.gated_activation(*tensors, self.kind, self.p, state)
            reference.gated_activation_backward(self.grad, *tensors, self.kind, self.p, state, [True, True])


def time_case(benchmark: BenchmarkFixture, case: Case, provider: str) -> None:
    runs = {"peft": case.step(case.peft), "reference": case.reference_step, "safe": case.step(case.safe)}
    facts = {}
    if provider != "reference":
        facts["retained_bytes"] = retention.measure(getattr(case, provider)).bytes
    compare(benchmark, runs[provider], runs["peft"], rounds=3 if provider == "reference" else 40, **facts)
    p, case.p = case.p, 0.0  # compare the results of the timed functions without dropout
    torch.testing.assert_close(case.safe(), case.peft(), rtol=1e-4, atol=1e-5)
    case.p = p


@pytest.mark.parametrize("provider", ["peft", "reference", "safe"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", ["SmolLM2-up"])
def test_gated_activation(benchmark: BenchmarkFixture, shape: str, kind: str, p: float, provider: str) -> None:
    time_case(benchmark, Case(shape, kind, True, p), provider)


@pytest.mark.parametrize("provider", ["peft", "reference", "safe"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("shape", ["MiniLM-up"])
def test_activation(benchmark: BenchmarkFixture, shape: str, kind: str, provider: str) -> None:
    time_case(benchmark, Case(shape, kind, False, 0.0), provider)


@pytest.mark.parametrize("provider", ["peft", "reference", "safe"])
@pytest.mark.parametrize("shape", ["MiniLM-hidden", "MiniLM-up"])
def test_dropout(benchmark: BenchmarkFixture, shape: str, provider: str) -> None:
    time_case(benchmark, Case(shape, None, False, 0.1), provider)
