"""What takes too long for every run: four processes, and a compiled model (`make processes`)."""

from __future__ import annotations

import functools
from typing import Any

import meshes
import pytest
import torch
from meshes import train_on_mesh
from ranks import together
from shares import LONG, LONG_STEPS, alone, assert_equal, digest, events, shares
from tiny import adamw, bert, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.distributed.fsdp import whole

expected = functools.cache(functools.partial(alone, LONG_STEPS, LONG))


def outcome(model: nn.Module, freezer: AdapterFreezer, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "events": events(freezer), "digest": digest(model)}


def train_on_four(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    model = bert()
    ddp = DistributedDataParallel(model, **options)
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**LONG))
    return outcome(model, freezer, train(ddp, optimizer, shares(LONG_STEPS, rank, 4), freezer))


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}])
def test_ddp_on_four_processes_equals_one(options: dict[str, Any]) -> None:
    assert_equal(together(train_on_four, options, world=4), expected())


def train_sharded_on_four(rank: int, score: str) -> dict[str, Any]:
    model = bert()
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**LONG, score=score))
    losses = train(model, optimizer, shares(LONG_STEPS, rank, 4), freezer)
    sums = [float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters()]
    return {"losses": losses, "events": events(freezer), "digest": sums}


@pytest.mark.parametrize("score", ["cka", "relative_norm", "gradient_sensitivity"])
def test_fsdp2_on_four_processes_equals_one(score: str) -> None:
    assert_equal(together(train_sharded_on_four, score, world=4), expected(score=score))


@pytest.mark.parametrize(
    ("kind", "grouped", "score"),
    [
        ("HSDP", False, "cka"),
        ("HSDP", False, "gradient_sensitivity"),
        ("FSDP2 and TP", False, "cka"),
        ("FSDP2 and TP", True, "relative_norm"),
        ("FSDP2 and TP", False, "gradient_sensitivity"),
    ],
)
def test_meshes_of_two_by_two_equal_one_process(kind: str, grouped: bool, score: str) -> None:
    assert_equal(together(train_on_mesh, (2, 2), kind, {"score": score}, grouped, world=4), expected_on_mesh(score))


@functools.cache
def expected_on_mesh(score: str) -> dict[str, Any]:
    return alone(meshes.STEPS, meshes.OPTIONS, score=score)


def train_blocks_compiled(rank: int, outside: bool) -> dict[str, Any]:
    """Each block compiled; and, `outside`, the whole around them."""
    model = bert()
    for block in model.base_model.model.bert.encoder.layer:
        block.compile(backend="eager")
        fully_shard(block)
    fully_shard(model)
    compiled: Any = torch.compile(model, backend="eager") if outside else model
    optimizer = adamw(model)
    freezer = AdapterFreezer(compiled, optimizer, SafeConfig(**meshes.OPTIONS))
    losses = train(compiled, optimizer, shares(meshes.STEPS, rank, 2), freezer)
    sums = [float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters()]
    return {"losses": losses, "events": events(freezer), "digest": sums}


@pytest.mark.parametrize("outside", [False, True])
def test_compiled_blocks_that_are_sharded_equal_one_process(outside: bool) -> None:
    assert_equal(together(train_blocks_compiled, outside), expected_on_mesh("cka"))


ONE_EVENT = {"score": "relative_norm", "warmup": 1, "max_warmup": 1, "freeze_end": 2, "freeze_interval": 8}


def train_compiled(rank: int, outside: bool | None) -> dict[str, Any]:
    model = bert(layers=1)
    compiled = functools.partial(torch.compile, backend="eager")
    if outside is None:
        ddp: Any = DistributedDataParallel(model)
    else:
        ddp = compiled(DistributedDataParallel(model)) if outside else DistributedDataParallel(compiled(model))
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**LONG | ONE_EVENT))
    return outcome(model, freezer, train(ddp, optimizer, shares(5, rank, 2), freezer))


def test_a_compiled_model_equals_one_that_is_not() -> None:
    eager = together(train_compiled, None)
    assert len(eager[0]["events"]) == 5
    for outside in (True, False):
        compiled = together(train_compiled, outside)
        for one, other in zip(compiled, eager, strict=True):
            assert one["events"] == other["events"]
            assert one["losses"] == pytest.approx(other["losses"], abs=2e-6)
        assert compiled[0]["digest"] == compiled[1]["digest"]
