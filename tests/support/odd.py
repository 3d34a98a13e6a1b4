"""A small model with every kind of layer that LoRA adapts, other than nn.Linear: embedding, convolutions, experts."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCABULARY, randomise_adapters
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput as Output


class Experts(nn.Module):
    """A mixture that gives every token to the expert its place says; its weights are bare parameters."""

    def __init__(self, experts: int, d: int, f: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, d, f) * d**-0.5)
        self.down = nn.Parameter(torch.randn(experts, f, d) * f**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        expert = torch.arange(hidden.shape[-2]) % len(self.up)
        h = torch.einsum("btd,tdf->btf", hidden, self.up[expert]).relu()
        return torch.einsum("btf,tfd->btd", h, self.down[expert])


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.slide = nn.Conv1d(16, 16, 3, padding=1)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.experts = Experts(2, 16, 24)
        self.mix = nn.Linear(16, 16)
        self.score = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        hidden = self.words(input_ids)
        hidden = hidden + self.grouped(self.slide(hidden.mT)).mT
        hidden = hidden + self.image(hidden[:, None]).mean(1) + self.volume(hidden[:, None, None]).mean((1, 2))
        hidden = self.mix(hidden + self.experts(hidden)).relu()
        logits = self.score((hidden * attention_mask[..., None]).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)


ODD_LAYERS = ["words", "slide", "grouped", "image", "volume", "mix"]


def odd(**lora: Any) -> PeftModel:
    """With an adapter on every layer and on both of the experts' parameters; the last layer trains whole."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ODD_LAYERS, "modules_to_save": ["score"]}
    options |= {"target_parameters": ["experts.up", "experts.down"]} if "use_dora" not in lora else {}
    model = get_peft_model(Odd(), LoraConfig(**options | lora))  # type: ignore[arg-type]
    randomise_adapters(model)
    with torch.no_grad():  # of an embedding's adapter it is A that starts with zeros
        model.base_model.model.words.lora_embedding_A["default"].normal_(std=0.1)
    return model.train()
