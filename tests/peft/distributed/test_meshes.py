"""HSDP and tensor parallel: freezing equals one process, and processes that share a layer decide the same."""

from __future__ import annotations

import functools

import pytest
from meshes import OPTIONS, STEPS, split_mlps, train_on_mesh
from ranks import together
from shares import alone, assert_equal
from tiny import adamw, bert
from torch.distributed.device_mesh import init_device_mesh

from safe_peft import AdapterFreezer, PlanError, SafeConfig


@functools.cache
def expected(**options: str) -> dict[str, list[float]]:
    return alone(STEPS, OPTIONS, **options)


def test_replicas_of_shards_equal_one_process() -> None:
    assert_equal(together(train_on_mesh, (2, 1), "HSDP", {}), expected())


@pytest.mark.parametrize(("kind", "grouped"), [("TP", True), ("FSDP2 and TP", False)])
def test_processes_that_share_layers_decide_the_same_as_one(kind: str, grouped: bool) -> None:
    """Each sees other features of a layer; those that share the batch alone would come apart."""
    assert_equal(together(train_on_mesh, (1, 2), kind, {}, grouped), expected())


def refuse_budget(rank: int) -> str:
    model = bert()
    split_mlps(model, init_device_mesh("cpu", (2,)))
    with pytest.raises(PlanError) as caught:
        AdapterFreezer(model, adamw(model), SafeConfig(**OPTIONS, memory_budget="1MiB"))
    return str(caught.value)


def test_a_budget_is_refused_where_layers_are_shared() -> None:
    assert all("tensor parallel" in said and 'freeze_by="adapters"' in said for said in together(refuse_budget))


def test_adapters_freeze_by_number_where_layers_are_shared() -> None:
    assert_equal(together(train_on_mesh, (1, 2), "TP", {"freeze_by": "bytes"}, True), expected())
