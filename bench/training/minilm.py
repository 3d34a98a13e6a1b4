"""MiniLM with LoRA on every linear layer, and one training step of it: real weights, batches of 32 x 32 tokens."""

from __future__ import annotations

from typing import Any

import assets
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LAYERS, ADAPTERS = 6, 36


def make_model(lora_dropout: float, frozen: int = 0, **options: Any) -> nn.Module:
    """The model in training mode, its lowest `frozen` adapters frozen as stock PEFT can: by requires_grad."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(assets.fetch("minilm"), num_labels=2)
    options |= {"r": 8, "lora_alpha": 16, "lora_dropout": lora_dropout, "target_modules": TARGETS}
    lora = LoraConfig(task_type="SEQ_CLS", **options)
    model = get_peft_model(model, lora).train()
    for name in adapter_names(model)[:frozen]:
        layer = model.get_submodule(name)
        for part in (layer.lora_A, layer.lora_B):
            part.requires_grad_(False)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """Paths of the adapted layers, lowest first."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def make_batch(rows: int = 32, length: int = 32) -> dict[str, Tensor]:
    """Random words, no padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 30000, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }


class Step:
    """One training step: forward, backward, AdamW."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def forward(self) -> Tensor:
        """The loss."""
        return self.model(**self.batch).loss

    def __call__(self) -> None:
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
