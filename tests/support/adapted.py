"""Small models with bottleneck adapters that do something."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from families import family
from peft import PeftModel, get_peft_model
from tiny import bert
from torch import nn

from safe_peft.bottleneck import BottleneckConfig


def randomise(model: nn.Module, std: float = 0.1) -> None:
    """A new adapter has W_up = 0 and no biases, where many a mistake would not show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_up" in name or ("bottleneck_down" in name and name.endswith("bias")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    """The model in training mode with an adapter of 8 hidden units for 32 features."""
    torch.manual_seed(0)
    options = {"reduction_factor": 4, "dropout": tiny.DROPOUT, **options}
    model = get_peft_model(base, BottleneckConfig(**options)).train()
    randomise(model)
    return model


def adapted_bert(layers: int = 2, **options: Any) -> PeftModel:
    """BERT with two adapters per layer; `classifier` trains whole."""
    return adapted(bert(layers).unload(), **{"task_type": "SEQ_CLS", **options})


def adapted_family(name: str, p: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """One of the families, with dropout p in the model itself."""
    base = family(name).model(p=p).unload().requires_grad_(False).to(dtype)
    return adapted(base, **options)
