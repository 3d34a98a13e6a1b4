"""Engines that cannot adapt when parameters stop training, each with an alternative."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel

from .wrappers import parameters_of, walk


def refusal(model: nn.Module, outer: nn.Module, optimizer: object) -> str | None:
    """Return the reason why adapters cannot be frozen under a model's engine; None if they can.

    Args:
        model: the model without wrappers.
        outer: the model with all known wrappers.
        optimizer: the model's optimizer, possibly wrapped by an engine.
    """
    if any(_is_deepspeed(item) for item in (outer, model, *_chain(optimizer))) or _is_zero3(model):
        return (
            "DeepSpeed keeps gradients and optimizer state in flat partitions, which would still change a frozen "
            "adapter; use DDP or FSDP2 (accelerate's fsdp_version=2)"
        )
    if isinstance(outer, DataParallel) and len(outer.device_ids) > 1:
        return REPLICA
    if any(
        type(module).__name__ == "FullyShardedDataParallel"
        for module in (outer, *(module for _, module in walk(model)))
    ):
        return (
            "FSDP1 needs all parameters of a unit to train, or none; use FSDP2: fully_shard, or accelerate's "
            "fsdp_version=2"
        )
    return None


REPLICA = (
    "nn.DataParallel copies the model for every call and loses the state of layers; start one process per device "
    "instead, with torchrun or accelerate launch"
)


def _is_deepspeed(item: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(item).__mro__)


def _is_zero3(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in parameters_of(model))


def _chain(optimizer: object) -> list[object]:
    found = [optimizer]
    while (inner := getattr(found[-1], "optimizer", None)) is not None and inner not in found:
        found.append(inner)
    return found
