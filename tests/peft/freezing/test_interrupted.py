"""A training that is interrupted, or whose freezer is forgotten: what the next training of the same model finds."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import EARLY, adamw, batches, bert, train
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from safe_peft import AdapterFreezer, BindingError, SafeCallback, SafeConfig, bind
from safe_peft.binding.class_swap import is_bound

DROPOUT = 0.1


def dropouts(model: nn.Module) -> list[float]:
    return [d.p for name, d in model.named_modules() if "lora_dropout.default" in name and isinstance(d, nn.Dropout)]


def trains(model: nn.Module) -> int:
    return sum(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def frozen_half(**options: Any) -> tuple[Any, AdapterFreezer]:
    """Twelve adapters, some of them frozen, in the middle of a training."""
    model = bert(lora_dropout=DROPOUT)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"score": "random"} | options))
    train(model, optimizer, batches(8), freezer)
    assert freezer.frozen and trains(model) < 24 and 0.0 in dropouts(model)
    return model, freezer


def test_everything_trains_again_once_the_freezer_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    model, freezer = frozen_half()
    with caplog.at_level(logging.WARNING):
        del freezer
        gc.collect()
    assert trains(model) == 24 and set(dropouts(model)) == {DROPOUT}
    assert not any(is_bound(module) for module in model.modules())
    told = [record.message for record in caplog.records if "was deleted before its training" in record.message]
    assert told and all(
        "detach(keep_frozen=True)" in message for message in told
    )  # freezers of other tests may die too


def test_a_freezer_in_a_cycle_is_forgotten_when_the_next_is_made() -> None:
    model, freezer = frozen_half()
    gc.disable()
    try:
        cycle: list[Any] = [freezer]
        cycle.append(cycle)
        del cycle, freezer
        second = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    finally:
        gc.enable()
    assert len(second.adapters) == 12 and set(dropouts(model)) == {DROPOUT}


def test_a_dropout_that_was_changed_meanwhile_stays_so() -> None:
    model, freezer = frozen_half()
    first, second, *_ = (d for n, d in model.named_modules() if n.endswith("lora_dropout.default") and d.p == 0.0)
    first.p, second.p = 0.25, float(0)
    freezer.detach()
    assert first.p == 0.25 and second.p == 0.0
    assert sorted(dropouts(model)) == [0.0, *[DROPOUT] * 10, 0.25]


def test_what_is_meant_to_stay_frozen_does() -> None:
    model, freezer = frozen_half()
    left = trains(model)
    freezer.detach(keep_frozen=True)
    del freezer
    gc.collect()
    assert trains(model) == left and len(AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).adapters) == left / 2


def test_a_training_that_ended_stays_as_it_is() -> None:
    model = bert(lora_dropout=DROPOUT)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="random"), total_steps=16)
    train(model, optimizer, batches(16), freezer)
    left = trains(model)
    del freezer
    gc.collect()
    assert left < 24 and trains(model) == left


def test_the_error_names_calls_that_work() -> None:
    model, freezer = frozen_half()
    with pytest.raises(BindingError, match=r"detach\(\) on that freezer.*release\(keep_frozen=False\)"):
        AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    bind(model).release(keep_frozen=False)
    assert trains(model) == 24 and set(dropouts(model)) == {DROPOUT}
    second = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    assert len(second.adapters) == 12
    with pytest.raises(BindingError, match="detached"):
        freezer.step()


# ---------------------------------------------------------------- a Trainer's


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


def trainer(model: nn.Module, folder: Path, callbacks: list[Any]) -> Trainer:
    rows = [
        {k: v.tolist() for k, v in zip(batch, values, strict=True)}
        for batch in batches(6)
        for values in zip(*batch.values(), strict=True)
    ]
    args = TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), callbacks=callbacks)


OPTIONS = {**EARLY, "score": "random", "freeze_end": 11}


@pytest.mark.parametrize("how", ["another trainer", "the same trainer", "added later"])
def test_a_trainer_takes_over_from_one_that_was_interrupted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    model = bert(lora_dropout=DROPOUT)
    first = SafeCallback(OPTIONS)
    interrupted = trainer(model, tmp_path, [first, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert trains(model) < 24
    second = first if how == "the same trainer" else SafeCallback(OPTIONS)
    with caplog.at_level(logging.WARNING):
        if how == "the same trainer":
            interrupted.remove_callback(Interrupt)
            again = interrupted
        elif how == "added later":
            again = trainer(model, tmp_path, [])
            again.add_callback(second)
        else:
            again = trainer(model, tmp_path, [second])
        again.train()
    assert any("was interrupted" in record.message for record in caplog.records)
    assert len(second.freezer.adapters) == 12 and second.freezer.frozen
    assert trains(model) == 24 and set(dropouts(model)) == {DROPOUT}
    trained = {id(p) for group in again.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in trained for p in model.parameters() if p.requires_grad)


def test_a_trainer_that_was_asked_to_leave_adapters_frozen_is_not_undone(tmp_path: Path) -> None:
    model = bert(lora_dropout=DROPOUT)
    first = SafeCallback(OPTIONS, detach=False)
    trainer(model, tmp_path, [first]).train()
    left = trains(model)
    assert left < 24
    with pytest.raises(BindingError, match=r"callback\.freezer\.detach\(\)"):
        trainer(model, tmp_path, [SafeCallback(OPTIONS)]).train()
    assert trains(model) == left
    del first
    gc.collect()
    assert trains(model) == left


def test_a_training_after_a_take_over_is_that_of_a_fresh_model(tmp_path: Path) -> None:
    """With the weights of the start put back, the second training is the one that was never interrupted."""
    model = bert()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, [SafeCallback(OPTIONS), Interrupt()]).train()
    model.load_state_dict(start)
    trainer(model, tmp_path, [SafeCallback(OPTIONS)]).train()
    fresh = bert()
    trainer(fresh, tmp_path, [SafeCallback(OPTIONS)]).train()
    torch.testing.assert_close(model.state_dict(), fresh.state_dict(), rtol=0, atol=0)
