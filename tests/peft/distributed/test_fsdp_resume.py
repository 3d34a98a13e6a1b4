"""Going on under FSDP2 after a freeze event: optimizer states by their own state dict, and through torch's DCP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from ranks import together
from shares import OPTIONS, STEPS, events, shares
from tiny import adamw, bert, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.distributed.fsdp import whole

SAVE_AT = 9
"""After the first freezings, and before the last."""
DCP = {"shards": {}, "whole": {"full_state_dict": True, "broadcast_from_rank0": True}}
WAYS = ("optimizer first", "freezer first", *DCP)


def make() -> tuple[nn.Module, Any, AdapterFreezer]:
    model = bert()
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    optimizer = adamw(model)
    return model, optimizer, AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS))


def save(model: nn.Module, optimizer: Any, freezer: AdapterFreezer, way: str) -> tuple[Any, ...]:
    if way in DCP:
        options = StateDictOptions(full_state_dict=way == "whole")
        parts = (
            get_model_state_dict(model, options=options),
            get_optimizer_state_dict(model, optimizer, options=options),
        )
    else:
        parts = model.state_dict(), optimizer.state_dict()
    return copy.deepcopy((*parts, freezer.state_dict()))


def load(model: nn.Module, optimizer: Any, freezer: AdapterFreezer, saved: tuple[Any, ...], way: str) -> None:
    weights, moments, state = saved
    if way in DCP:
        options = StateDictOptions(**DCP[way])
        set_model_state_dict(model, weights, options=options)
        freezer.load_state_dict(state)  # first: what it freezes has no state that could be loaded
        set_optimizer_state_dict(model, optimizer, moments, options=options)
        return
    model.load_state_dict(weights)
    if way == "freezer first":
        freezer.load_state_dict(state)
    optimizer.load_state_dict(moments)
    if way == "optimizer first":
        freezer.load_state_dict(state)


def outcome(model: nn.Module, freezer: AdapterFreezer, losses: list[float]) -> list[Any]:
    return [losses, events(freezer), [whole(p.detach()).tolist() for p in model.parameters()]]


def resume(rank: int) -> dict[str, list[Any]]:
    """Trains to the end, and again from `SAVE_AT` on in every way."""
    data = list(shares(STEPS, rank, 2))
    training = make()
    model, optimizer, freezer = training
    losses = train(model, optimizer, iter(data[:SAVE_AT]), freezer)
    assert freezer.frozen
    saved = {way: save(*training, way) for way in WAYS}
    outcomes = {}
    for way in ("never", *WAYS):
        if way != "never":
            training = model, optimizer, freezer = make()
            load(*training, saved[way], way)
        outcomes[way] = outcome(model, freezer, losses + train(model, optimizer, iter(data[SAVE_AT:]), freezer))
    return outcomes


def test_resumed_trainings_end_with_the_same_weights() -> None:
    for rank in together(resume):
        expected = rank.pop("never")
        assert any(step > SAVE_AT for step, _ in expected[1])
        assert all(got == expected for got in rank.values()), [way for way in rank if rank[way] != expected]


def load_the_optimizer_first(rank: int) -> str:
    model, optimizer, freezer = make()
    train(model, optimizer, shares(SAVE_AT, rank, 2), freezer)
    moments = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    model, optimizer, freezer = make()
    with pytest.raises(RuntimeError) as error:
        set_optimizer_state_dict(model, optimizer, moments)
    return str(error.value)


def test_dcp_wants_a_state_of_every_parameter_that_trains() -> None:
    """Why the freezer comes first; if torch ever goes without, docs/resume.md may say so."""
    assert all("Missing optimizer state for parameter" in message for message in together(load_the_optimizer_first))
