"""Every row and column of the table in docs/adapters.md."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_families import FAMILIES, AdapterFamily, freeze_half
from blocks import error, loss_and_gradients, retained
from ranks import each_together
from shares import OPTIONS, ROWS, STEPS, assert_equal, digest, events, share
from tiny import EARLY, adamw, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from safe_peft import AdapterFreezer, SafeConfig, bind, explain
from safe_peft.distributed.fsdp import whole
from safe_peft.planning.inputs import Inputs
from safe_peft.planning.tracing import trace

PAGE = Path(__file__).parents[2] / "docs/adapters.md"
ROWS_OF_TABLE = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
each_family = pytest.mark.parametrize("one", FAMILIES, ids=str)
ODD = FAMILIES[-1]
"""It has a conv3d, which in bfloat16 has values without meaning on a CPU, in PyTorch itself."""


def batch_of(one: AdapterFamily) -> dict[str, torch.Tensor]:
    return next(one.data(1))


def test_the_table_has_a_row_for_each_family_with_its_op() -> None:
    ops = {row[0]: row[1] for row in ROWS_OF_TABLE[1:]}
    expected = {one.name: f"`{one.op}`" if one.op else "PEFT's code" for one in FAMILIES}
    assert {name: op.split(",")[0] for name, op in ops.items() if name in expected} == expected


@each_family
def test_fast_path(one: AdapterFamily) -> None:
    model = one.make()
    with bind(model):
        model(**batch_of(one))
        rows = explain(model)
        assert {row.path for row in rows} <= {
            f"safe_kernels::{one.op}" if one.op else "peft",
            "safe_kernels::lora_linear",
        }
        assert one.op or any("has no kernel" in row.reason for row in rows)


@each_family
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_pefts_and_bytes_no_more(one: AdapterFamily, frozen: bool) -> None:
    stock, bound, batch = one.make(), one.make(), batch_of(one)
    if frozen:
        assert freeze_half(stock) == freeze_half(bound)
    expected, limit = loss_and_gradients(stock, batch), retained(stock, batch)
    with bind(bound):
        got, found = loss_and_gradients(bound, batch), retained(bound, batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert found <= limit


@pytest.mark.parametrize("trains", ["adapters", "everything"])
@pytest.mark.parametrize(
    ("one", "autocast"),
    [(one, autocast) for one in FAMILIES for autocast in (False, True) if not (autocast and one is ODD)],
    ids=str,
)
def test_a_scoring_step_has_the_same_gradients(one: AdapterFamily, trains: str, autocast: bool) -> None:
    """PyTorch caches parameters, under autocast and if they are parametrized: scoring must not fill its caches."""
    models = one.make(), one.make()
    scored = models[1]
    for model in models if trains == "everything" else ():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("original_module" not in name)
    config = SafeConfig(**EARLY | {"warmup": 0, "target_fraction": 0.0, "never_freeze": ("*",)})
    freezer = AdapterFreezer(scored, torch.optim.SGD(scored.parameters(), lr=0.0), config)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (_, expected), (_, got) = (loss_and_gradients(model, batch_of(one)) for model in models)
    freezer.step()
    assert len(freezer.ledger.scorings) == 1
    assert got.keys() == expected.keys()
    worst = max(error(got[name], grad) for name, grad in expected.items() if grad.abs().max() > 1e-6)
    assert worst <= (5e-2 if autocast else 1e-5)


@each_family
def test_scored_and_frozen(one: AdapterFamily) -> None:
    model = one.make()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"target_fraction": 0.5}))
    train(model, optimizer, one.data(16), freezer)
    importance = freezer.ledger.scorings[0].importance
    assert set(importance) == {adapter.name for adapter in freezer.adapters}
    assert all(map(math.isfinite, importance.values())) and max(importance.values()) > 1e-6
    assert len(freezer.ledger.freezings) == len(freezer.adapters) // 2
    frozen = {freezing.name for freezing in freezer.ledger.freezings}
    held = [a for a in freezer.adapters if a.name in frozen]
    assert not any(p.requires_grad for adapter in held for p in adapter.parameters())


@each_family
@pytest.mark.parametrize("frozen", [False, True])
def test_planned(one: AdapterFamily, frozen: bool) -> None:
    model, batch = one.make(), batch_of(one)
    names = freeze_half(model) if frozen else []
    planned = trace(model, Inputs.of(batch), frozen=names)
    with bind(model):
        assert planned.retained == planned.table.bytes(names) == retained(model, batch)


@each_family
def test_compiled(one: AdapterFamily) -> None:
    """One block: each further one takes the compiler as long again."""
    model, batch = one.make(), batch_of(one)
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        del blocks[1:]
    torch._dynamo.reset()
    with bind(model):
        expected = loss_and_gradients(model, batch)
        got = loss_and_gradients(torch.compile(model, backend="aot_eager"), batch)
    gradients = {name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}
    torch.testing.assert_close((got[0], gradients), expected, rtol=1e-4, atol=1e-5)


def train_shared(rank: int, number: int, engine: str) -> dict[str, Any]:
    one = FAMILIES[number]
    model = one.make()
    wrapped: Any = model
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    elif engine == "fsdp2":
        wrapped = fully_shard(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(wrapped, optimizer, SafeConfig(**OPTIONS))
    data = one.data(STEPS, rows=ROWS)
    losses = train(wrapped, optimizer, data if engine == "" else (share(batch, rank, 2) for batch in data), freezer)
    sums = [float(whole(p.detach()).double().abs().sum()) for p in model.parameters()] if engine else digest(model)
    return {"losses": losses, "events": events(freezer), "digest": sums}


alone = functools.cache(functools.partial(train_shared, 0, engine=""))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_distributed(engine: str) -> None:
    """Two processes that share the batches train and freeze as one process does."""
    cases = [(number, engine) for number in range(len(FAMILIES))]
    for (number, _), ranks in zip(cases, each_together(train_shared, cases), strict=True):
        assert_equal(ranks, alone(number))
