"""A whole training step of MiniLM, ours compared with stock PEFT with the same adapters frozen."""

from __future__ import annotations

import pytest
import torch
from comparison import compare
from minilm import ADAPTERS, Step, adapter_names, make_batch, make_model
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import safe_peft
from safe_kernels import retention


def switch_off_dropout(model: nn.Module, frozen: int) -> None:
    """What the freezer does to a frozen adapter's dropout."""
    for name in adapter_names(model)[:frozen]:
        for dropout in model.get_submodule(name).lora_dropout.values():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0


def make_steps(p: float, frozen: int) -> dict[str, Step]:
    batch = make_batch()
    steps = {"peft": Step(make_model(p, frozen), batch), "safe": Step(make_model(p, frozen), batch)}
    safe_peft.bind(steps["safe"].model)
    switch_off_dropout(steps["safe"].model, frozen)
    return steps


def check_equal(steps: dict[str, Step]) -> None:
    """Without dropout, what was timed computes the same loss."""
    for step in steps.values():
        step.model.eval()
    losses = [float(make_equal(step, steps["peft"]).forward()) for step in steps.values()]
    assert abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0])


def make_equal(step: Step, other: Step) -> Step:
    step.model.load_state_dict(other.model.state_dict())
    return step


@pytest.mark.parametrize("provider", ["peft", "safe"])
@pytest.mark.parametrize("percent", [0, 50, 75])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_step(benchmark: BenchmarkFixture, p: float, percent: int, provider: str) -> None:
    steps = make_steps(p, ADAPTERS * percent // 100)
    retained = retention.measure(steps[provider].forward, exclude=steps[provider].model).bytes
    compare(benchmark, steps[provider], steps["peft"], rounds=8, retained_bytes=retained)
    with torch.no_grad():
        check_equal(steps)
