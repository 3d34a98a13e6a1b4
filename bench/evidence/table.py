"""Memory of full fine-tuning, of stock LoRA and of ours for BERT-large, planned without running it."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from safe_peft import plan_memory
from safe_peft.planning.plan import MemoryPlan, Side

BATCH, LENGTH = 32, 128
GIB = 2**30


def plan(full: bool = False, frozen: float = 0.0, layers: int = 24) -> MemoryPlan:
    """Plan one step: LoRA r 8 on all linear layers, or all weights.

    Args:
        full: all weights train.
        frozen: share of the adapters that are frozen, lowest first.
        layers: blocks of the model.
    """
    shape = BertConfig(
        hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096, num_labels=2
    )
    with torch.device("meta"):
        base = BertForSequenceClassification(shape)
        model = get_peft_model(
            base, LoraConfig(task_type="SEQ_CLS", r=8, lora_dropout=0.1, target_modules="all-linear")
        )
    if full:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)
    return plan_memory(model, BATCH, LENGTH, frozen=frozen, device="cuda", padded=True)


def rows(layers: int = 24) -> list[tuple[str, MemoryPlan, Side]]:
    """Return the rows of the table: a title, the plan, and the side of it that counts."""
    lora = plan(layers=layers)
    made = [("full fine-tuning", plan(full=True, layers=layers)), ("LoRA, stock PEFT", lora)]
    found = [(title, one, one.stock) for title, one in made]
    found.append(("LoRA, ours, nothing frozen", lora, lora.ours))
    for share in (0.5, 0.75):
        one = plan(frozen=share, layers=layers)
        found.append((f"LoRA, ours, lowest {share:.0%} frozen", one, one.ours))
    return found


def lines(layers: int = 24) -> list[str]:
    """Return the table of docs/evidence.md."""
    found = rows(layers)
    whole = found[0][2].peak
    made = ["| | weights | gradients, optimizer | activations | peak | compared with full fine-tuning |"]
    made.append("|---|---|---|---|---|---|")
    for title, one, side in found:
        cells = [one.parameters, one.gradients + one.optimizer, side.retained, side.peak]
        numbers = " | ".join(f"{cell / GIB:.2f} GiB" for cell in cells)
        made.append(f"| {title} | {numbers} | {100 * (side.peak / whole - 1):+.1f} % |")
    return made
