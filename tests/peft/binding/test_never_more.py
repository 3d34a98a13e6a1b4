"""Whatever reads a part's output, and whatever trains: never more bytes than stock PEFT, and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from norm_classes import RMSNorm
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safe_kernels.retention import measure
from safe_peft import bind
from safe_peft.bottleneck import BottleneckConfig

D, F, ROWS = 16, 32, 12


class Gated(nn.Module):
    """Llama's MLP, whose last layer is the reader."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.act_fn = nn.Linear(D, F), nn.Linear(D, F), nn.SiLU()
        self.reader = nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """A layer, something that is computed from its output, and the reader of that."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.fc1, self.middle, self.reader = nn.Linear(D, F), middle, nn.Linear(F, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.middle(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.below, self.layers, self.checkpoints = nn.Linear(D, D), nn.ModuleList([block]), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.below(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        return x.square().sum()


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: Plain(nn.ReLU()),
    "gelu": lambda: Plain(nn.GELU()),
    "silu": lambda: Plain(nn.SiLU()),
    "gated": Gated,
    "layer norm": lambda: Plain(nn.LayerNorm(F)),
    "rms norm": lambda: Plain(RMSNorm(F)),
    "torch's rms norm": lambda: Plain(nn.RMSNorm(F)),
    "nothing": lambda: Plain(nn.Identity()),
}
PATHS: dict[str, dict[str, Any]] = {
    "fast": {"target_modules": ["below", "reader"]},
    "dora": {"target_modules": ["below", "reader"], "use_dora": True},
    "bias": {"target_modules": ["below", "reader"], "lora_bias": True},
    "plain": {"target_modules": ["below"]},
    "bottleneck relu": {"target_modules": ["below", "reader"], "non_linearity": "relu"},
    "bottleneck gelu": {"target_modules": ["below", "reader"], "non_linearity": "gelu"},
    "bottleneck parallel": {"target_modules": ["below", "reader"], "non_linearity": "silu", "placement": "parallel"},
    "whole": {"target_modules": ["below"], "modules_to_save": ["reader"]},
}
TRAINS = {
    "nothing": (),
    "all of the reader": ("reader",),
    "only its lora_B": ("reader.lora_B",),
    "all of it, and the layer below": ("reader", "below"),
    "only its lora_B, and the layer below": ("reader.lora_B", "below"),
    "the layer below": ("below",),
    "only lora_B below": ("below.lora_B",),
    "only the layers up, and the layer below": ("reader.bottleneck_up", "below"),
    "only the layers up": ("reader.bottleneck_up", "below.bottleneck_up"),
}


def pair(path: str, middle: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config: PeftConfig = LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False)
        if "non_linearity" in PATHS[path]:
            config = BottleneckConfig(reduction_factor=4, dropout=dropout, init_weights=False)
        config = replace(config, **PATHS[path])
        models.append(get_peft_model(Net(MIDDLES[middle]()), config).train())
    return models[0], models[1]


def train(model: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name or "bottleneck_" in name or "modules_to_save" in name
        parameter.requires_grad_(adapter and any(f"{part}." in name for part in names))
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, names: tuple[str, ...], x: Tensor, backward: bool) -> tuple[int, list[Tensor]]:
    trained = train(model, names)
    retained = measure(lambda: model(x), exclude=model)
    if not backward or not retained.output.requires_grad:
        return retained.bytes, []
    return retained.bytes, list(torch.autograd.grad(retained.output, trained))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("path", PATHS)
def test_bytes_and_gradients(path: str, middle: str, dropout: float) -> None:
    model, stock = pair(path, middle, dropout)
    x = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(1))
    with bind(model):
        for trains, names in TRAINS.items():
            for checkpoints in (False, True):
                model.base_model.model.checkpoints = stock.base_model.model.checkpoints = checkpoints
                got, expected = (step(m, names, x, not dropout) for m in (model, stock))
                assert got[0] <= expected[0], (trains, checkpoints)
                for mine, other in zip(got[1], expected[1], strict=True):
                    worst = (mine - other).abs().max()
                    assert worst <= 2e-5 * other.abs().max(), (trains, checkpoints, worst)
