"""Bound and stock models of blocks, what is frozen in them, and how far apart they are."""

from __future__ import annotations

from typing import Any

import torch
from families import Family
from torch import Tensor, nn

from safe_kernels.retention import measure
from safe_peft import bind


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def freeze(model: nn.Module, which: str) -> None:
    """By requires_grad alone, as stock PEFT can."""
    layers = adapter_layers(model)
    count = len(layers)
    generator = torch.Generator().manual_seed(5)
    chosen = {
        "none": [],
        "prefix": range(count // 2),
        "suffix": range(count // 2, count),
        "alternating": range(0, count, 2),
        "random": torch.randperm(count, generator=generator)[: count // 2].tolist(),
        "all": range(count),
    }[which]
    for index in chosen:
        layers[index].lora_A.requires_grad_(False)
        layers[index].lora_B.requires_grad_(False)


def thaw(model: nn.Module) -> None:
    for layer in adapter_layers(model):
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch).loss
    if loss.requires_grad:
        loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def together(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


def freeze_block(model: nn.Module, path: str) -> None:
    """All adapters of one block."""
    for name, module in model.named_modules():
        if path in name and hasattr(module, "lora_A"):
            module.requires_grad_(False)


def retained(model: nn.Module, batch: dict[str, Tensor]) -> int:
    return measure(lambda: model(**batch).loss, exclude=[model, *batch.values()]).bytes


def frozen_prefix(one: Family, layers: int = 3) -> tuple[Any, dict[str, Tensor]]:
    """All but the last block frozen (of an encoder and decoder: all but the last of the decoder)."""
    model = one.model(layers=layers)
    with bind(model) as binding:
        for name in binding.blocks[:-1]:
            freeze_block(model, name)
    return model, one.batch()
