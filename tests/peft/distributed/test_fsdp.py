"""FSDP2 (`fully_shard`): freezing equals one process, and gradients of what is frozen are not scattered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ranks import together
from shares import OPTIONS, STEPS, alone, assert_equal, events, shares
from tiny import adamw, bert, train
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import safe_peft
from safe_peft import AdapterFreezer, BindingError, SafeConfig
from safe_peft.parallel.fsdp import whole

expected = functools.cache(alone)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """A unit a block, and the root."""
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def digest(model: nn.Module) -> list[float]:
    return [float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters()]


def outcome(model: nn.Module, freezer: AdapterFreezer, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "events": events(freezer), "digest": digest(model)}


def train_sharded(rank: int, options: dict[str, Any], config: dict[str, Any], bound_before: bool) -> dict[str, Any]:
    model = bert()
    if bound_before:
        safe_peft.bind(model)
    shard(model, **options)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS | config))
    return outcome(model, freezer, train(model, optimizer, shares(STEPS, rank, 2), freezer))


@pytest.mark.parametrize("score", ["cka", "relative_norm", "gradient_sensitivity", "random"])
def test_losses_and_freezings_equal_one_process(score: str) -> None:
    assert_equal(together(train_sharded, {}, {"score": score}, False), expected(score=score))


@pytest.mark.parametrize("reshard", [True, False])
def test_a_model_bound_before_it_is_sharded_equals_one_process(reshard: bool) -> None:
    assert_equal(together(train_sharded, {"reshard_after_forward": reshard}, {}, True), expected())
