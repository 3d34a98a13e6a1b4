"""A small model of convolutions, as in a UNet: normalised, and added up."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCABULARY, randomise_adapters
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput as Output


class Block(nn.Module):
    """A block of a UNet: two convolutions, and one of size 1 in parallel."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, d_in), nn.Conv2d(d_in, d_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, d_out), nn.Conv2d(d_out, d_out, 3, padding=1, groups=2)
        self.conv_shortcut = nn.Conv2d(d_in, d_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(nn.functional.silu(self.norm2(hidden)))


class Pictures(nn.Module):
    """Draws a sentence as a picture, and classifies it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8)
        self.slide = nn.Conv1d(8, 8, 3, padding=1)
        self.conv_in = nn.Conv2d(1, 4, 3, padding=1)
        self.block = Block(4, 8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.score = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.slide(self.words(input_ids).mT)
        hidden = self.down(self.block(self.conv_in(hidden[:, None])))
        logits = self.score(hidden.mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)


def pictures(**lora: Any) -> PeftModel:
    """With an adapter on every convolution; the last layer trains whole."""
    torch.manual_seed(0)
    targets = ["slide", "conv_in", "conv1", "conv2", "conv_shortcut", "down"]
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "modules_to_save": ["score"]}
    model = get_peft_model(Pictures(), LoraConfig(**options | lora))  # type: ignore[arg-type]
    randomise_adapters(model)
    return model.train()
