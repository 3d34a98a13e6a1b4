"""Looks through what others put around a model or an optimizer, and shortens the paths that this makes long."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .errors import BindingError


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP's wrapper and `torch.compile`'s.

    Args:
        model: what a user passed as a model.

    Raises:
        BindingError: It is none.

    Example:
        >>> unwrap(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise BindingError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, DistributedDataParallel | DataParallel):
        return unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrap(compiled) if isinstance(compiled, nn.Module) else model


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that holds the state and runs the hooks: accelerate puts another around it.

    Args:
        optimizer: what a user passed as one.

    Raises:
        BindingError: It is none.

    Example:
        >>> unwrap_optimizer(accelerator.prepare(optimizer)) is optimizer  # doctest: +SKIP
        True
    """
    if not isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "param_groups"):
        raise BindingError(
            f"optimizer: expected a torch.optim.Optimizer, or a list of them, got {type(optimizer).__name__}."
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def trains_besides(model: nn.Module, own: Iterable[nn.Parameter]) -> bool:
    """Return whether a model has a parameter that trains and is none of these.

    Example:
        >>> trains_besides(model := nn.Linear(2, 2), [model.weight])
        True
    """
    known = {id(parameter) for parameter in own}
    return any(p.requires_grad and id(p) not in known for p in model.parameters())


def short_name(path: str) -> str:
    """Return a layer's path without what PEFT puts before the model's own names.

    Example:
        >>> short_name("base_model.model.encoder.layer.0.query")
        'encoder.layer.0.query'
    """
    return path.removeprefix("base_model.model.")
