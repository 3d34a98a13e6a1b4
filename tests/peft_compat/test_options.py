"""Whatever way LoRA is set up: training equals stock PEFT's, files are the same, and freezing works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from life import assert_same_files
from life_options import OPTIONS, Option
from peft.optimizers import create_loraplus_optimizer
from tiny import EARLY, adamw, batches, bert, train

from safe_peft import AdapterFreezer, SafeConfig, bind, explain


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_training_equals_stock_peft_and_saves_the_same_files(option: Option, tmp_path: Path) -> None:
    losses = {}
    for name in ("stock", "bound"):
        model = option.make()
        if name == "bound":
            bind(model)
            assert {row.reason for row in explain(model)} == option.reasons
        torch.manual_seed(0)
        losses[name] = train(model, adamw(model), option.data(6))
        model.save_pretrained(tmp_path / name)
    assert losses["bound"] == pytest.approx(losses["stock"], rel=1e-4)
    assert losses["stock"][0] != losses["stock"][-1]
    assert_same_files(tmp_path / "bound", tmp_path / "stock")


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_adapters_freeze_and_stay_frozen(option: Option) -> None:
    model = option.make()
    optimizer = adamw(model, lr=1e-3)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(target_fraction=0.5, **EARLY))
    train(model, optimizer, option.data(15), freezer)
    assert abs(len(freezer.frozen) - 0.5 * len(freezer.adapters)) <= 0.5
    assert freezer.frozen and not freezer.unscored
    frozen = [p for a in freezer.adapters if a.name in freezer.frozen for p in a.parameters()]
    before = [p.detach().clone() for p in frozen]
    model.set_adapter("default")
    train(model, optimizer, option.data(2), freezer)
    assert all(torch.equal(old, new) for old, new in zip(before, frozen, strict=True))


def test_lora_plus_trains_at_two_rates_and_forgets_what_is_frozen() -> None:
    losses = {}
    for name in ("stock", "freezing"):
        model = bert()
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
        assert {1e-3, 16e-3} <= {group["lr"] for group in optimizer.param_groups}
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY)) if name == "freezing" else None
        losses[name] = train(model, optimizer, batches(14), freezer)
    first = freezer.ledger.freezings[0].step
    assert losses["freezing"][:first] == pytest.approx(losses["stock"][:first], rel=1e-5)
    for adapter in freezer.adapters:
        assert all((p in optimizer.state) != (adapter.name in freezer.frozen) for p in adapter.parameters())
