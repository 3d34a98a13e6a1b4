"""Plans for a model that FSDP2 has sharded: to the byte, and the decisions by bytes that follow from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import together
from shares import OPTIONS, STEPS, events, shares
from tiny import adamw, bert, train
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import safe_peft
from safe_kernels.retention import record, storages
from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.distributed.fsdp import fsdp_modules
from safe_peft.planning.inputs import Inputs
from safe_peft.planning.tracing import trace


def shard(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(dtype, output_dtype=torch.float32))


def parameters(model: nn.Module) -> set[int]:
    """Storages of whole parameters and of shards, which are no part of what is retained."""
    tensors = [getattr(p, "_local_tensor", p) for p in [*model.parameters(), *model.buffers()]]
    for unit in fsdp_modules(model):
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        tensors += [parameter._unsharded_param for group in groups for parameter in group.fsdp_params]
    return {key for tensor in tensors for key, _ in storages(tensor)}


def plan_and_measure(rank: int) -> list[tuple[int, int]]:
    found = []
    batch = next(shares(1, rank, 2))
    for dtype in (None, torch.bfloat16):
        model = shard(bert(lora_dropout=0.1), dtype)
        for fast in (False, True):
            if fast:
                safe_peft.bind(model)
            loss, saves = record(lambda: model(**batch).loss, lambda: None)  # noqa: B023
            known = parameters(model) | {key for column in batch.values() for key, _ in storages(column)}
            sizes = {k: size for save in saves for k, size in storages(save.tensor) if k not in known}
            loss.backward()
            found.append((trace(model, Inputs.of(batch), fast=fast).retained, sum(sizes.values())))
    return found


def test_a_plan_of_a_sharded_model_is_right_to_the_byte() -> None:
    first, second = together(plan_and_measure)
    assert first == second and len({planned for planned, _ in first}) == 4
    assert all(planned == measured for planned, measured in first)


def decide_by_bytes(rank: int, options: dict[str, Any]) -> dict[str, list[Any]]:
    """The same training under DDP and sharded, when it was bound already or not."""
    found = {}
    for engine in ("DDP", "sharded"):
        model = bert(layers=3)
        if engine == "sharded" and options.get("freeze_by"):
            safe_peft.bind(model)
        outer = DistributedDataParallel(model) if engine == "DDP" else shard(model)
        optimizer = adamw(model)
        freezer = AdapterFreezer(outer, optimizer, SafeConfig(**OPTIONS | options | {"freeze_interval": 6}))
        losses = train(outer, optimizer, shares(STEPS, rank, 2), freezer)
        blocks = list(safe_peft.explain(model).blocks.values())
        found[engine] = [events(freezer), sorted(freezer.binding.recompute), blocks, losses]
    return found


@pytest.mark.parametrize(
    "options",
    [{"freeze_by": "bytes", "target_fraction": 0.6}, {"memory_budget": 90_000, "recompute": "auto"}],
    ids=["target", "budget"],
)
def test_decisions_by_bytes_are_those_under_ddp(options: dict[str, Any]) -> None:
    first, second = together(decide_by_bytes, options)
    (*decisions, losses) = first["DDP"]
    assert decisions[0] and ("memory_budget" not in options or decisions[1])
    for rank in (first, second):
        for *others, _ in rank.values():
            assert others == decisions
    for *_, others in first.values():
        assert others == pytest.approx(losses, abs=2e-6)
