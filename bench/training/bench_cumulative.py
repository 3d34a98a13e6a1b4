"""One technique after the other on a Llama-shaped model: bytes a step retains, its time, and how exact it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import adapter_layers, make_batch, make_model, switch_off_frozen_dropout
from torch import Tensor, nn

import safe_peft
from safe_kernels import retention

STAGES = (
    "stock PEFT",
    "+ adapters on safe_kernels.lora",
    "+ norms retain their output",
    "+ MLPs retain the pre-activation",
    "+ lower half of the blocks frozen",
    "+ every other block of the rest frozen, run again in backward",
)
_PARTS: tuple[tuple[str, ...], ...] = ((), (), ("norms",), ("norms", "mlps", "dropouts"))


def prepare(stage: int, p: float) -> nn.Module:
    """The model with all techniques up to one."""
    model = make_model("llama", p, "nothing")
    for name, layer in adapter_layers(model):
        index = next(int(part) for part in name.split(".") if part.isdigit())
        if (stage >= 4 and index < 4) or (stage >= 5 and index in (5, 7)):
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
    if stage > 0:
        binding = safe_peft.bind(model, parts=_PARTS[min(stage, 3)])
        binding.recompute.update(binding.blocks if stage >= 5 else ())
        switch_off_frozen_dropout(model)
    return model


def make_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """Forward, backward, AdamW."""
    optimizer = torch.optim.AdamW((q for q in model.parameters() if q.requires_grad), lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deviation(stage: int, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Of the loss and of all gradients from stock PEFT's with the same adapters frozen, relative; without dropout."""
    ours, stock = prepare(stage, 0.0), prepare(0, 0.0)
    for own, other in zip(ours.parameters(), stock.parameters(), strict=True):
        other.requires_grad_(own.requires_grad)
    losses = []
    for model in (ours, stock):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # it starts at zero, where many a mistake would not show
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.02)
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), stock.parameters(), strict=True) if b.grad is not None]
    difference = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return abs(losses[0] / losses[1] - 1), (difference / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_cumulative(benchmark: BenchmarkFixture, stage: int, p: float) -> None:
    batch = make_batch("llama")
    model, stock = prepare(stage, p), prepare(0, p)
    retained = retention.measure(lambda: model(**batch).loss, exclude=[model, *batch.values()]).bytes
    compare(benchmark, make_step(model, batch), make_step(stock, batch), rounds=4, retained_bytes=retained)
    loss, gradients = deviation(stage, batch)
    benchmark.extra_info |= {"technique": STAGES[stage], "loss_deviation": loss, "gradient_deviation": gradients}
    assert gradients < 1e-5
