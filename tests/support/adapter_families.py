"""A small model of every family of adapters, as docs/adapters.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from adapted import adapted_bert
from experts import mixture
from odd import odd
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from pictures import pictures
from tiny import batches, bert, gpt2, randomise_adapters
from torch import Tensor

from safe_peft import bind


@dataclass(frozen=True)
class AdapterFamily:
    """One row of docs/adapters.md.

    Args:
        name: the row's first cell.
        make: a model with adapters of this family; the same every time.
        op: what computes its layers on the fast path; "" if PEFT's own code does.
        data: gives batches for it.
    """

    name: str
    make: Callable[[], PeftModel]
    op: str
    data: Callable[..., Iterator[dict[str, Tensor]]] = batches

    def __str__(self) -> str:
        return self.name


def causal(count: int, rows: int = 8) -> Iterator[dict[str, Tensor]]:
    """Every token has a label, so that two halves of a batch weigh the same."""
    for batch in batches(count, rows=rows):
        yield {**batch, "labels": batch["input_ids"]}


def freeze_half(model: PeftModel) -> list[str]:
    """Freeze the lower half of the adapters for good, and return their names."""
    with bind(model) as binding:
        adapters = binding.live_adapters()
        for adapter in adapters[: len(adapters) // 2]:
            adapter.freeze()
        return [adapter.name for adapter in adapters[: len(adapters) // 2]]


def with_random(model: PeftModel) -> PeftModel:
    randomise_adapters(model)
    return model


def several(**lora: Any) -> PeftModel:
    """Two active adapters of different ranks in the attention; one in each other layer."""
    lora = {"lora_dropout": tiny.DROPOUT, "fan_in_fan_out": True} | lora
    model = gpt2(**lora)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], **lora))
    model.base_model.set_adapter(["default", "second"])
    return with_random(model)


def ia3() -> PeftModel:
    """Vectors on the outputs of attention, and on the input of the MLP's second layer."""
    modules = {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]}
    model = get_peft_model(bert().unload(), IA3Config(task_type="SEQ_CLS", **modules))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model.train()


FAMILIES = (
    AdapterFamily("LoRA on `nn.Linear`", lambda: with_random(bert()), "lora_linear"),
    AdapterFamily("LoRA on transformers' `Conv1D`", lambda: with_random(gpt2()), "lora", causal),
    AdapterFamily("rsLoRA", lambda: with_random(bert(use_rslora=True)), "lora_linear"),
    AdapterFamily("LoRA with a bias (`lora_bias`)", lambda: with_random(bert(lora_bias=True)), "lora_linear"),
    AdapterFamily("several active adapters", several, "lora", causal),
    AdapterFamily("DoRA on `nn.Linear`", lambda: with_random(bert(use_dora=True)), "dora"),
    AdapterFamily("bottleneck adapters", adapted_bert, "bottleneck"),
    AdapterFamily("IA3 on linear layers", ia3, ""),
    AdapterFamily("LoRA on convolutions (`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`)", pictures, "lora_conv"),
    AdapterFamily("LoRA on experts' parameters (`target_parameters`)", mixture, ""),
    AdapterFamily("LoRA on embeddings", lambda: odd(target_modules=["words", "mix"], target_parameters=None), ""),
)
