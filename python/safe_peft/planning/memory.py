"""Tells what a training step will cost in memory, before any training: bytes by block and by what keeps them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..binding.blocks import transformer_blocks
from ..distributed.wrappers import parameters_of, unwrap
from ..errors import ConfigError, PlanError
from .device import device_kind
from .fake_model import FakeModel
from .inputs import Inputs, inputs_for
from .plan import GroupRow, MemoryPlan, Side
from .retained import RetainedTable
from .tracing import Trace, live_adapters, trace

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
    """Plan the memory of one training step, for stock PEFT and for ours, without values and without running the model.

    A step runs on tensors that have shapes but no memory, through the model's own code: so a model may be on the meta
    device, and any architecture is planned that runs without looking at its data. Mixed precision is planned inside
    `torch.autocast`. What activation checkpointing without reentrance keeps is not seen in retained bytes.

    Args:
        model: a PEFT model on any device, bound or not; it is not changed.
        batch_size: rows per batch.
        sequence_length: tokens per row; None where the model takes pictures.
        frozen: shell patterns of adapters to freeze, or a share of them in [0, 1], lowest first.
        recompute: shell patterns of blocks that run again in backward once they are frozen.
        batch: a model's arguments, of which the shapes count, instead of the two sizes.
        padded: rows are of different length, so that attention takes a mask.
        keep_dropout: leave the dropout of frozen adapters on, as stock PEFT does.
        optimizer_states: numbers the optimizer keeps for one that trains: 2 for AdamW.
        device: where the model will train, "cpu" or "cuda", with or without one here; None: where it is, and the CPU if
            that is the meta device.
        loss: how the training computes its loss, such as `lambda model, batch: model(**batch).loss`. It is given a copy
            of the model, and the batch as a dict, and must take all of the model from there. None: the model's own.

    Returns:
        The plan; print it for tables.

    Raises:
        PlanError: The model or the loss does not run without values, or nothing says what the batch looks like.
        ConfigError: A pattern matches nothing, or a share is none.
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
        raise PlanError("batch_size: needed in addition to the model, or else batch=..., a batch whose shapes count.")
    else:
        inputs = inputs_for(model, batch_size, sequence_length, padded=padded)
    kind = device_kind(device)
    if loss is not None and not callable(loss):
        raise ConfigError(f"loss: expected a function of a model and a batch, got {loss!r}.")
    fake = FakeModel(model, kind).module
    adapters = live_adapters(fake)
    names = chosen([adapter.name for adapter in adapters], frozen, "frozen", "adapter")
    blocks = chosen(list(transformer_blocks(fake)), recompute, "recompute", "block")
    return plan_of(
        fake,
        inputs,
        frozen=names,
        recompute=blocks,
        keep_dropout=keep_dropout,
        optimizer_states=optimizer_states,
        title=_title(model),
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
    title: str = "",
    device: str = "",
    loss: Loss | None = None,
) -> MemoryPlan:
    """Plan for exact names and shapes; see `plan_memory`.

    Args:
        model: nothing of it frozen yet, not even its dropout.
        inputs: the batch.
        frozen: names of adapters.
        recompute: names of blocks.
        keep_dropout: as in `plan_memory`.
        optimizer_states: likewise.
        title: what is planned for.
        device: the kind of device, "" for the model's.
        loss: as in `plan_memory`.
    """
    step = partial(trace, model, inputs, frozen=frozen, device=device, loss=loss)
    stock = step(fast=False)
    ours = step(recompute=recompute, keep_dropout=keep_dropout)
    # What more freezing would free is asked of a trace that recomputes nothing: a block that does shows no inside.
    table = ours.table if not recompute else step(keep_dropout=keep_dropout).table
    adapters = live_adapters(model)
    return MemoryPlan(
        model=title or _title(model),
        batch=describe(inputs),
        adapters=len(adapters),
        frozen=tuple(name for name in (adapter.name for adapter in adapters) if name in set(frozen)),
        recompute=tuple(recompute),
        stock=_side(stock, optimizer_states),
        ours=_side(ours, optimizer_states),
        parameters=ours.parameters,
        inputs=ours.inputs,
        gradients=ours.gradients,
        optimizer=optimizer_states * ours.gradients,
        groups=tuple(_groups(table, stock.table, recompute)),
        blocks=tuple(_blocks(table, recompute)),
        device=device or _kind(model),
    )


def _kind(model: nn.Module) -> str:
    kind = next((parameter.device.type for parameter in parameters_of(model)), "cpu")
    return "cpu" if kind == "meta" else kind


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


def _blocks(table: RetainedTable, recompute: Collection[str]) -> list[tuple[str, int]]:
    now, lives = table.bytes(recompute=recompute), []
    for block in table.blocks:
        lives.append([not block.holds >> bit & 1 for bit in range(len(table.adapters))] + [True])
    if not lives:
        return []
    rest = table.bytes_of(np.array(lives), recompute)
    return [(block.name, int(now - size)) for block, size in zip(table.blocks, rest, strict=True)]


def chosen(names: Sequence[str], wanted: Sequence[str] | float, option: str, what: str) -> list[str]:
    """Return the names that patterns or a share mean, in their own order.

    Args:
        names: all there are.
        wanted: shell patterns, or a share of the names, the first of them.
        option: named in errors.
        what: what the names are of.

    Raises:
        ConfigError: A pattern matches nothing, or the share is none.

    Example:
        >>> chosen(["a.0", "a.1", "b.0", "b.1"], ["a.*"], "frozen", "adapter")
        ['a.0', 'a.1']
        >>> chosen(["a.0", "a.1", "b.0", "b.1"], 0.75, "frozen", "adapter")
        ['a.0', 'a.1', 'b.0']
    """
    if isinstance(wanted, int | float):
        if isinstance(wanted, bool) or not 0.0 <= wanted <= 1.0:
            raise ConfigError(f"{option}: expected patterns or a share between 0 and 1, got {wanted!r}.")
        return list(names[: math.floor(wanted * len(names) + 0.5)])
    patterns = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ConfigError(f"{option}: expected shell patterns, got {wrong[0]!r}.")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = f"they have names such as {names[0]!r}" if names else "there is none"
            raise ConfigError(f"{option}: {pattern!r} matches no {what}; {some}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def describe(inputs: Inputs) -> str:
    """Say what a batch looks like.

    Example:
        >>> from safe_peft.planning.inputs import InputSpec
        >>> describe(Inputs({"input_ids": InputSpec((8, 128), "int64")}))
        'input_ids 8 x 128'
    """
    named = [pair for call in inputs.calls for pair in call.tensors.items()]
    shapes = [f"{name} {' x '.join(map(str, spec.shape))}" for name, spec in named]
    return ", ".join(shapes) + (", padded" if inputs.padded else "")


def _title(model: nn.Module) -> str:
    base = getattr(model, "get_base_model", lambda: model)()
    return getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__
