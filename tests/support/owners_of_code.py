"""Whose code a bound model runs."""

from __future__ import annotations

from torch import nn

from safe_peft.binding.class_swap import original_type

NAMES = ("llama", "bert", "gpt2", "t5", "t5-gated", "mpnet")


def owners(model: nn.Module, *classes: str) -> list[nn.Module]:
    return [module for module in model.modules() if original_type(module).__name__ in classes]
