"""A small model of our own with LoRA, which compiles in no time, and a training loop over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adamw, randomise_adapters
from torch import Tensor, nn

from safe_peft import AdapterFreezer, SafeConfig

WIDTH, ROWS = 8, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(self.act(self.up(self.norm(hidden_states))))


class Toy(nn.Module):
    """Returns its loss; `around` is put around every block's call, as a checkpointing function would be."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 1)
        self.around: Callable[..., Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.around(block, x)
        return (self.head(x) - target).square().mean()


def toy(blocks: int = 2, **lora: Any) -> PeftModel:
    """Two adapters per block; the head trains whole. The adapters do something from the start."""
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "down"], "modules_to_save": ["head"]} | lora
    model = get_peft_model(Toy(blocks), LoraConfig(**options)).train()
    randomise_adapters(model)
    return model


def pairs(count: int, rows: int = ROWS, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """Something that can be learnt."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(rows, WIDTH, generator=generator)
        yield {"x": x, "target": x[:, :1] * x[:, 1:2]}


SOON = {"warmup": 2, "max_warmup": 2, "freeze_end": 14, "freeze_interval": 2, "score_interval": 4, "block_rows": 8}
"""Scores at steps 4, 8, 12 and 14, and freezes from step 4 on."""


def freezer_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> AdapterFreezer:
    return AdapterFreezer(model, optimizer or adamw(model), SafeConfig(**SOON | options))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
