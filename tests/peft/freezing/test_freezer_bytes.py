"""The freezer deciding by bytes: a budget, a target in bytes, blocks that recompute, and going on after a restart."""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from blocks import retained
from peft import PeftModel
from tiny import EARLY, adamw, batches, bert, causal_batches, gpt2, train
from torch import Tensor

import safe_peft
from safe_peft import AdapterFreezer, ConfigError, FreezeReport, PlanError, SafeConfig, plan_memory

FEW = EARLY | {"freeze_interval": 5}
"""Freezing at three steps or so."""


def full_batches(count: int, seed: int = 1, rows: int = 8) -> Iterator[dict[str, Tensor]]:
    """Without padding, whatever the mask says."""
    for batch in batches(count, seed=seed, rows=rows):
        yield {"input_ids": batch["input_ids"].clamp(min=3), "labels": batch["labels"]}


def trained(steps: int = 16, model: PeftModel | None = None, **options: Any) -> tuple[PeftModel, AdapterFreezer]:
    model = bert(layers=3, lora_dropout=0.1) if model is None else model
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**{**FEW, "score": "relative_norm", **options}))
    train(model, optimizer, full_batches(steps), freezer)
    return model, freezer


def now(model: PeftModel) -> int:
    return retained(model.train(), next(full_batches(1, seed=5)))


@functools.cache
def full() -> int:
    """Bytes of a step while everything trains."""
    return plan_memory(bert(layers=3, lora_dropout=0.1), 8, 12).ours.retained


@functools.cache
def spared() -> int:
    """Bytes that freezing everything saves."""
    return full() - plan_memory(bert(layers=3, lora_dropout=0.1), 8, 12, frozen=1.0).ours.retained


@pytest.mark.parametrize(("recompute", "share"), [("off", 0.9), ("frozen", 0.55), ("auto", 0.55), ("auto", 0.3)])
def test_a_budget_is_met_from_freeze_end_on(share: float, recompute: str) -> None:
    budget = int(share * full())
    model, freezer = trained(memory_budget=budget, recompute=recompute)
    assert now(model) <= budget
    assert freezer.frozen and len(freezer.frozen) < 18
    steps = [freezing.step for freezing in freezer.ledger.freezings]
    assert steps[0] > freezer.ledger.warmup_end and steps[-1] <= 14
    assert all(freezing.threshold is None for freezing in freezer.ledger.freezings)
    if recompute == "auto":
        assert freezer.binding.recompute <= set(freezer.binding.blocks)


def test_the_budget_comes_on_top_of_the_fraction() -> None:
    model, freezer = trained(memory_budget=full(), target_fraction=0.5)
    assert len(freezer.frozen) == 9
    model, tight = trained(memory_budget=full() // 3, target_fraction=0.25)
    by_curve = [freezing for freezing in tight.ledger.freezings if freezing.threshold is not None]
    assert now(model) <= full() // 3 and 0 < len(by_curve) < len(tight.frozen)


def test_a_budget_above_all_needs_nothing() -> None:
    _, freezer = trained(memory_budget="1GiB", recompute="auto")
    assert not freezer.frozen and not freezer.binding.recompute


def test_a_budget_that_cannot_be_met_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, freezer = trained(memory_budget=64, never_freeze=("*.layer.0.*",))
    said = [record.message for record in caplog.records if "memory_budget cannot be met" in record.message]
    assert len(said) == 1 and f"{now(model):,} bytes" in said[0] and "64 allowed" in said[0]
    assert not any(".layer.0." in name for name in freezer.frozen)


def test_padding_counts() -> None:
    model = bert(layers=3)
    optimizer = adamw(model)
    config = SafeConfig(**FEW, score="relative_norm", memory_budget=full() // 2)
    freezer = AdapterFreezer(model, optimizer, config)
    train(model, optimizer, batches(16), freezer)
    assert freezer.planner.planned.inputs.padded
    assert retained(model, next(batches(1, seed=9))) <= full() // 2


def test_it_plans_for_the_largest_batch_so_far() -> None:
    model = bert(layers=3)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**FEW, score="relative_norm", memory_budget=full() // 2))
    for rows in (2, 16, 8):
        train(model, optimizer, full_batches(1, rows=rows), freezer)
    assert freezer.planner.planned.inputs.rows == 16
    with freezer.suspended():
        model(**next(full_batches(1, rows=64)))
    model.eval()
    model(**next(full_batches(1, rows=64)))
    model.train()
    with torch.no_grad():
        model(**next(full_batches(1, rows=64)))
    assert freezer.planner.planned.inputs.rows == 16


@pytest.mark.parametrize("recompute", ["off", "frozen"])
def test_the_target_may_be_a_share_of_bytes(recompute: str) -> None:
    model, freezer = trained(freeze_by="bytes", target_fraction=0.6, recompute=recompute)
    assert full() - now(model) >= 0.6 * spared()
    assert freezer.binding.recompute == (set(freezer.binding.blocks) if recompute == "frozen" else set())


def test_a_target_in_bytes_is_met_though_the_lowest_adapter_is_the_most_important() -> None:
    """Taken by importance alone, all others would freeze and free next to nothing: the graph would go on down there."""
    model = bert(layers=3, lora_dropout=0.1)
    lowest = next(iter(safe_peft.bind(model).layers.values()))
    torch.nn.init.constant_(lowest.lora_B["default"].weight, 3.0)
    model, freezer = trained(model=model, freeze_by="bytes", target_fraction=0.6)
    importance = freezer.ledger.scorings[0].importance
    assert max(importance, key=importance.get) == freezer.adapters[0].name
    assert full() - now(model) >= 0.6 * spared()
    assert freezer.adapters[0].name in freezer.frozen and len(freezer.frozen) < len(freezer.adapters) - 1


def test_what_is_spared_is_no_part_of_the_target_in_bytes() -> None:
    _, freezer = trained(freeze_by="bytes", target_fraction=0.5, never_freeze=("*.layer.0.*",))
    assert 0 < len(freezer.frozen) < 12, "half of what the other twelve would free, not all of them"


def test_frozen_blocks_recompute() -> None:
    spared = ("*.layer.0.*", "*.layer.2.*")
    sizes = {}
    for recompute in ("off", "frozen"):
        model, freezer = trained(target_fraction=1 / 3, recompute=recompute, never_freeze=spared)
        assert len(freezer.frozen) == 6 and all(".layer.1." in name for name in freezer.frozen)
        sizes[recompute] = now(model)
        freezer.detach()
        assert not any(hasattr(module, "_safe_state") for module in model.modules())
    assert sizes["frozen"] < sizes["off"]


def test_recomputing_changes_nothing_about_training() -> None:
    losses = []
    for recompute in ("off", "frozen"):
        model = bert(layers=3, lora_dropout=0.1)
        optimizer = adamw(model)
        options = {"target_fraction": 1 / 3, "never_freeze": ("*.layer.0.*", "*.layer.2.*")}
        freezer = AdapterFreezer(
            model, optimizer, SafeConfig(**FEW, score="relative_norm", recompute=recompute, **options)
        )
        losses.append(train(model, optimizer, full_batches(24), freezer))
        assert len(freezer.frozen) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_adapter_is_spared_where_nothing_else_trains() -> None:
    model = gpt2()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**FEW, memory_budget=1))
    train(model, optimizer, causal_batches(16), freezer)
    assert len(freezer.frozen) < 8
    with pytest.raises(ConfigError, match=r"target_fraction: 1\.0 would freeze all 8 adapters"):
        model = gpt2()
        AdapterFreezer(model, adamw(model), SafeConfig(**FEW | {"freeze_by": "bytes"}, target_fraction=1.0))


def test_steps_without_a_forward_do_not_pass_in_silence() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**FEW, score="relative_norm", memory_budget=1))
    with pytest.raises(PlanError, match="memory_budget cannot be used: the training batch is unknown"):
        for _ in range(16):
            freezer.step()
    assert not freezer.frozen


def test_a_model_that_cannot_be_copied_is_measured() -> None:
    model = bert(layers=3, lora_dropout=0.1)
    model.lock = threading.Lock()
    _, freezer = trained(model=model, memory_budget=int(0.9 * full()))
    assert freezer.frozen and now(model) <= 0.9 * full()
    model = bert()
    model.lock = threading.Lock()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**FEW, score="relative_norm"))
    train(model, optimizer, full_batches(16), freezer)
    assert len(freezer.frozen) == 9
    with pytest.raises(PlanError, match="cannot be copied"):
        freezer.report(memory=True)


def test_a_plan_in_the_middle_of_a_training_is_not_observed() -> None:
    model, freezer = trained(steps=9)
    before = freezer.state_dict()
    assert plan_memory(model, 64, 12).ours.retained > 0
    assert freezer.state_dict() == before


def test_processes_plan_for_the_largest_batch_of_all(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, freezer = trained(model=bert(), memory_budget=full() // 3)
    finally:
        torch.distributed.destroy_process_group()
    assert freezer.frozen == trained(model=bert(), memory_budget=full() // 3)[1].frozen != ()


def test_the_report_says_where_each_byte_goes(tmp_path: Any) -> None:
    model, freezer = trained(target_fraction=0.75)
    report = freezer.report(memory=True)
    (first, start), (last, end) = report.plans
    assert (first, last) == ("start", "end")
    assert start.frozen == () and start.ours.retained == full()
    assert set(end.frozen) == set(freezer.frozen) and end.ours.retained == now(model) < end.stock.retained
    assert start.stock.by_part["LoRA dropout"] >= end.stock.by_part["LoRA dropout"] > 0, "stock leaves dropout on"
    assert "LoRA dropout" not in end.ours.by_part or end.ours.by_part["LoRA dropout"] == 0
    assert FreezeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.save_memory_png(tmp_path / "memory.png")
    report.save_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Where each byte of a step goes" in page and "stock, start" in page and "LoRA dropout" in page
    assert freezer.report().plans == ()
