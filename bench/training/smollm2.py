"""SmolLM2-135M (real weights) with LoRA on every linear layer, and one training step on plain text tokens.

Run as a script it trains a few steps in this fresh process and prints the peak of its memory as JSON:

    PYTHONPATH=examples python bench/training/smollm2.py --provider safe --p 0.1 --frozen "lower half" --loss chunked
"""

from __future__ import annotations

import argparse
import json

import assets
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import safe_peft
from safe_peft.finetune.measure import peak_rss
from safe_peft.loss import BY_NAME

LAYERS = 30
ROWS, LENGTH = 4, 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


FROZEN = {"none": slice(0, 0), "lower half": slice(0, LAYERS // 2), "all but the lowest": slice(1, LAYERS)}


def make_model(p: float, frozen: str = "none") -> nn.Module:
    """In training mode, fp32, the adapters of some blocks frozen by requires_grad."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(assets.fetch("smollm2"), dtype=torch.float32)
    base.config.use_cache = False
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=p, target_modules=TARGETS)
    model = get_peft_model(base, lora).train()
    for block in model.base_model.model.model.layers[FROZEN[frozen]]:
        for layer in block.modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A.requires_grad_(False)
                layer.lora_B.requires_grad_(False)
    return model


def switch_off_frozen_dropout(model: nn.Module) -> None:
    """Turn off the dropout of frozen adapters, as the freezer does."""
    for layer in model.modules():
        if hasattr(layer, "lora_A") and not next(layer.lora_A.parameters()).requires_grad:
            for dropout in layer.lora_dropout.values():
                dropout.p = 0.0


def make_batch(rows: int = ROWS, length: int = LENGTH) -> dict[str, Tensor]:
    """Random words, no padding."""
    ids = torch.randint(1000, 40000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


class Step:
    """One training step: forward, backward, AdamW."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], loss: str = "model") -> None:
        self.model, self.batch, self.loss = model, batch, BY_NAME[loss]
        self.optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def forward(self) -> Tensor:
        """The loss."""
        return self.loss(self.model, self.batch)

    def __call__(self) -> float:
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def main() -> None:
    """Train a few steps, and print peak memory and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", choices=["peft", "safe"], required=True)
    parser.add_argument("--p", type=float, default=0.0, help="dropout of the adapters")
    parser.add_argument("--frozen", choices=list(FROZEN), default="none", help="blocks")
    parser.add_argument("--loss", choices=list(BY_NAME), default="model")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    model = make_model(arguments.p, arguments.frozen)
    if arguments.provider == "safe":
        safe_peft.bind(model)
        switch_off_frozen_dropout(model)
    step = Step(model, make_batch(arguments.rows), arguments.loss)
    before = peak_rss()
    losses = [step() for _ in range(arguments.steps)]
    print(json.dumps({**vars(arguments), "rss_before": before, "peak_rss": peak_rss(), "losses": losses}))


if __name__ == "__main__":
    main()
