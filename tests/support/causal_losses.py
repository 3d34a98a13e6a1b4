"""Causal models and batches for losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import VOCABULARY, family
from torch import Tensor, nn

from safe_peft.loss.check import CHECKED_TOKENS

ROWS, LENGTH = 3, CHECKED_TOKENS + 8


def batch(padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(4))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[0, 30:], labels[0, 30:], labels[1, :33] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def made(name: str, **options: Any) -> Any:
    return family(name).model(**options)


def results(model: nn.Module, loss: Callable[..., Any], given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(5)
    value = loss(model, given)
    return value.detach(), list(torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad]))


def small(config: type, model: type, **extra: Any) -> nn.Module:
    options = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    options |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    return model(config(**options, **extra))


class AddsToItsLoss(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + 0.01  # as an auxiliary loss would
        return out
