"""A training step of a UNet's residual blocks with LoRA on every convolution, ours compared with stock PEFT.

Random weights, 2 pictures of 32 x 32 positions, r 8. *frozen* means that all adapters but those of the lowest block are
frozen, so that a gradient passes through all others.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from minilm import Step
from peft import LoraConfig, get_peft_model
from pytest_benchmark.fixture import BenchmarkFixture
from step_pairs import compare_with_stock
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS, CHANNELS, SIZE, ROWS = 2, 320, 32, 2
TARGETS = ["conv1", "conv2", "conv_shortcut"]


class Block(nn.Module):
    """As a UNet's ResnetBlock2D with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, CHANNELS), nn.GroupNorm(32, CHANNELS)
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(2))
        self.conv_shortcut = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class Blocks(nn.Module):
    """Blocks one after the other, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.blocks(x).square().mean())


def make_step(p: float, frozen: bool) -> Step:
    """The step, and its adapters frozen as stock PEFT can: by requires_grad."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_dropout=p, target_modules=TARGETS, init_lora_weights="gaussian")
    model = get_peft_model(Blocks(), config).train()  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if frozen and "lora_" in name and ".blocks.0." not in name:
            parameter.requires_grad_(False)
    return Step(model, {"x": torch.randn(ROWS, CHANNELS, SIZE, SIZE)})


@pytest.mark.parametrize("provider", ["peft", "safe"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_conv_step(benchmark: BenchmarkFixture, p: float, frozen: bool, provider: str) -> None:
    compare_with_stock(benchmark, lambda: make_step(p, frozen), provider, same_loss=p == 0.0)
