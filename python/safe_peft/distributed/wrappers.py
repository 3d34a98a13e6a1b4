"""Unwraps models and optimizers, lists their modules, and shortens layer paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import BindingError


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of DDP and `torch.compile`; it must be a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise BindingError(f"model: expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, DistributedDataParallel | DataParallel):
        return unwrap(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return unwrap(compiled) if isinstance(compiled, nn.Module) else model


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that holds the state and runs the hooks, inside accelerate's wrapper."""
    if not isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "param_groups"):
        raise BindingError(
            f"optimizer: expected a torch.optim.Optimizer, or a list of them, got {type(optimizer).__name__}."
        )
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def trains_besides(model: nn.Module, own: Iterable[nn.Parameter]) -> bool:
    """Return whether a model has a trainable parameter that is not in `own`."""
    known = {id(parameter) for parameter in own}
    return any(p.requires_grad and id(p) not in known for p in parameters_of(model))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the same as `named_modules`, without running any code of the modules.

    Some modules have side effects there: PEFT's `lora.MultiheadAttention` deletes and re-registers its weights at every
    call, and loses them if new parameters cannot be made.
    """
    seen, waiting = set[int](), [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [(key, child) for key, child in module._modules.items() if child is not None]
        waiting += [(f"{name}.{key}" if name else key, child) for key, child in reversed(children)]


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the same as `parameters`, without running any code of the modules."""
    found = {id(p): p for _, module in walk(model) for p in module._parameters.values() if p is not None}
    return list(found.values())


def buffers_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the same as `buffers`, without running any code of the modules."""
    found = {id(b): b for _, module in walk(model) for b in module._buffers.values() if b is not None}
    return list(found.values())


def short_name(path: str) -> str:
    """Return a layer's path without PEFT's prefix."""
    return path.removeprefix("base_model.model.")
