"""Tiny models with random weights, batches that can be learnt, and a training loop over both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from safe_peft import AdapterFreezer, SafeConfig

BERT_TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
VOCABULARY = 50
WIDTH, DROPOUT = 32, 0.0
"""Features of the hidden states, and the dropout of model and adapters except in attention; a benchmark sets others."""


def bert(layers: int = 2, **lora: Any) -> PeftModel:
    """BERT with six LoRA adapters per layer; `classifier` trains whole, as PEFT does for sequence classification."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=WIDTH // 16,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=32,
        hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=0.0,
    )
    options = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "lora_dropout": DROPOUT, "target_modules": BERT_TARGETS}
    return get_peft_model(BertForSequenceClassification(config), LoraConfig(**options | lora)).train()


def gpt2(**lora: Any) -> PeftModel:
    """GPT-2, whose linear layers are transformers' Conv1D; nothing but its LoRA adapters trains."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=2,
        n_head=WIDTH // 16,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": DROPOUT, "fan_in_fan_out": True}
    options |= {"target_modules": ["c_attn", "c_proj", "c_fc"]} | lora
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers does not know GPT-2's, and its warning breaks a compiler's graph
    return get_peft_model(model, LoraConfig(**options)).train()


def batches(count: int, rows: int = 8, length: int = 12, seed: int = 1) -> Iterator[dict[str, Tensor]]:
    """Sentences of random length; the label says whether token 3 occurs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        lengths = torch.randint(4, length + 1, (rows,), generator=generator)
        mask = (torch.arange(length)[None, :] < lengths[:, None]).long()
        ids = ids * mask
        yield {"input_ids": ids, "attention_mask": mask, "labels": (ids == 3).any(1).long()}


def causal_batches(count: int, **options: Any) -> Iterator[dict[str, Tensor]]:
    for batch in batches(count, **options):
        yield {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def adamw(model: nn.Module, lr: float = 3e-3) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[dict[str, Tensor]], freezer: Any = None
) -> list[float]:
    """The raw loop; returns its losses."""
    losses = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if freezer is not None:
            freezer.step()
        losses.append(loss.item())
    return losses


def randomise_adapters(model: nn.Module, std: float = 0.1) -> None:
    """LoRA starts with B = 0, where many a mistake would not show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


EARLY = {"warmup": 2, "max_warmup": 4, "freeze_end": 14, "freeze_interval": 2, "score_interval": 1}
EARLY |= {"freeze_by": "adapters"}
"""A whole schedule within sixteen steps, with a number of freezings that is easy to know."""


def run(
    steps: int = 16, model: PeftModel | None = None, **options: Any
) -> tuple[PeftModel, torch.optim.AdamW, AdapterFreezer, list[float]]:
    model = bert() if model is None else model
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**{**EARLY, **options}))
    return model, optimizer, freezer, train(model, optimizer, batches(steps), freezer)


class Rows(torch.utils.data.Dataset):
    """Rows for a Trainer."""

    def __init__(self, count: int) -> None:
        self.rows = [{name: column[0] for name, column in batch.items()} for batch in batches(count, rows=1)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]
