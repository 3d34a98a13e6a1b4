"""Predicts the memory of a training step before any training: bytes by block, and by the part that keeps them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..binding.blocks import transformer_blocks
from ..distributed.wrappers import parameters_of, unwrap
from ..errors import ConfigError, PlanError
from .fake_model import FakeModel
from .inputs import Inputs, inputs_for
from .plan import GroupRow, MemoryPlan, Side
from .retained import BlockFacts, RetainedTable
from .tracing import Trace, device_kind, live_adapters, trace

if TYPE_CHECKING:
    from ..loss import Loss

__all__ = ["MemoryPlan", "plan_memory", "plan_of"]


def plan_memory(
    model: nn.Module,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    *,
    frozen: Sequence[str] | float = (),
    recompute: Sequence[str] = (),
    batch: Mapping[str, Any] | None = None,
    padded: bool = False,
    keep_dropout: bool = False,
    optimizer_states: int = 2,
    device: str | torch.device | None = None,
    loss: Loss | None = None,
) -> MemoryPlan:
    """Plan the memory of one training step, for stock PEFT and for the fast path, without running the model.

    The model's own code runs a step on tensors that have shapes but no memory. So the model may be on the meta device,
    and every architecture works whose code does not read the values of its inputs. Mixed precision is planned inside
    `torch.autocast`. With activation checkpointing, a block retains its input.

    Args:
        model: a PEFT model on any device, bound or not; it is not changed.
        batch_size: samples per batch.
        sequence_length: tokens per sample; None for a model that takes images.
        frozen: shell patterns of adapters to freeze, or a share of the adapters in [0, 1], lowest first.
        recompute: shell patterns of blocks that run again in backward once they are frozen.
        batch: the model's arguments by name, instead of the two sizes; only their shapes count.
        padded: samples have different lengths, so that attention takes a mask.
        keep_dropout: leave the dropout of frozen adapters on, as stock PEFT does.
        optimizer_states: numbers that the optimizer keeps per trainable number: 2 for AdamW.
        device: where the model will train, "cpu" or "cuda"; this machine needs no such device. None: the model's own
            device, or the CPU for a model on the meta device.
        loss: computes the loss as the training does, such as `lambda model, batch: model(**batch).loss`. It receives a
            copy of the model and the batch as a dict, and must use only this copy. None: the model's own loss.

    Returns:
        The plan; print it for tables.

    Raises:
        PlanError: The model or the loss does not run without values, or the shapes of the batch are unknown.
        ConfigError: A pattern matches nothing, or a share is not in [0, 1].
        BindingError: The model has no layer that can be bound.

    Example:
        >>> print(plan_memory(model, batch_size=8, sequence_length=512, frozen=["*.layers.0.*"]))  # doctest: +SKIP
    """
    model = unwrap(model)
    if batch is not None and not isinstance(batch, Mapping):
        raise ConfigError(f"batch: expected a model's arguments by name, got {type(batch).__name__}.")
    if batch is not None:
        inputs = Inputs.of(batch)
    elif batch_size is None:
        raise PlanError(
            "batch_size: missing; pass batch_size and sequence_length, or pass batch=... (a training batch)."
        )
    else:
        inputs = inputs_for(model, batch_size, sequence_length, padded=padded)
    kind = device_kind(device)
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss: expected a function of a model and a batch, got {loss!r}.")
    fake = FakeModel(model, kind).module
    return plan_of(
        fake,
        inputs,
        frozen=_chosen([adapter.name for adapter in live_adapters(fake)], frozen, "frozen", "adapter"),
        recompute=_chosen(list(transformer_blocks(fake)), recompute, "recompute", "block"),
        keep_dropout=keep_dropout,
        optimizer_states=optimizer_states,
        device=kind,
        loss=loss,
    )


def plan_of(
    model: nn.Module,
    inputs: Inputs,
    *,
    frozen: Sequence[str] = (),
    recompute: Sequence[str] = (),
    keep_dropout: bool = False,
    optimizer_states: int = 2,
    device: str = "",
    loss: Loss | None = None,
) -> MemoryPlan:
    """Do the work of `plan_memory` for the module of a `FakeModel` with nothing frozen, exact names and known shapes.

    The device is a kind, as `device_kind` returns it.
    """
    step = partial(trace, model, inputs, frozen=frozen, device=device, loss=loss)
    stock = step(fast=False)
    ours = step(recompute=recompute, keep_dropout=keep_dropout)
    # A recomputed block retains nothing inside, so a trace without it shows what further freezing would free.
    table = ours.table if not recompute else step(keep_dropout=keep_dropout).table
    now, cut = table.bytes(recompute=recompute), _cut(table.blocks)
    names = [adapter.name for adapter in live_adapters(model)]
    return MemoryPlan(
        model=_title(model),
        batch=_describe(inputs),
        adapters=len(names),
        frozen=tuple(name for name in names if name in set(frozen)),
        recompute=tuple(recompute),
        stock=_side(stock, optimizer_states),
        ours=_side(ours, optimizer_states),
        parameters=ours.parameters,
        inputs=ours.inputs,
        gradients=ours.gradients,
        optimizer=optimizer_states * ours.gradients,
        groups=tuple(_groups(table, stock.table, recompute)),
        blocks=tuple((b.name, now - table.bytes(table.names(b.holds), recompute)) for b in table.blocks),
        device=device or parameters_of(model)[0].device.type,
        prefix=cut,
        prefix_sample=table.blocks[cut].sample if cut else 0,
    )


def _cut(blocks: Sequence[BlockFacts]) -> int:
    """Return the index of the lowest block that trains or passes a gradient on; at most that of the last block."""
    return next((i for i, block in enumerate(blocks[:-1]) if block.holds or block.passes), max(0, len(blocks) - 1))


def _side(traced: Trace, optimizer_states: int) -> Side:
    whole = traced.whole(optimizer_states)
    return Side(traced.retained, traced.table.by_part(), traced.table.by_block(), traced.peak, whole)


def _groups(ours: RetainedTable, stock: RetainedTable, recompute: Collection[str]) -> list[GroupRow]:
    now, stock_now = ours.bytes(recompute=recompute), stock.bytes()
    return [
        GroupRow(
            block=next((block.name for block in ours.blocks if names[0].startswith(f"{block.name}.")), ""),
            adapters=names,
            holds=ours.held_by(names),
            frees=now - ours.bytes(names, recompute),
            stock_frees=stock_now - stock.bytes(names),
        )
        for names in ours.groups()
    ]


def _chosen(names: Sequence[str], wanted: Sequence[str] | float, option: str, what: str) -> list[str]:
    """Return the names that match shell patterns, or the first ones up to a share; errors name the option."""
    if isinstance(wanted, int | float):
        if isinstance(wanted, bool) or not 0.0 <= wanted <= 1.0:
            raise ConfigError(f"{option}: expected patterns or a share between 0 and 1, got {wanted!r}.")
        return list(names[: math.floor(wanted * len(names) + 0.5)])
    patterns = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ConfigError(f"{option}: expected shell patterns, got {wrong[0]!r}.")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = f"use names such as {names[0]!r}" if names else "there is none"
            raise ConfigError(f"{option}: {pattern!r} matches no {what}; {some}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _describe(inputs: Inputs) -> str:
    """Return a batch's shapes as text, such as "input_ids 8 x 128"."""
    named = [pair for call in inputs.calls for pair in call.tensors.items()]
    shapes = [f"{name} {' x '.join(map(str, spec.shape))}" for name, spec in named]
    return ", ".join(shapes) + (", padded" if inputs.padded else "")


def _title(model: nn.Module) -> str:
    base = getattr(model, "get_base_model", lambda: model)()
    return getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__
