from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import retained
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny import batches, bert, train
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from safe_peft import AdapterFreezer, BindingError, SafeCallback, SafeConfig, StateError
from safe_peft.binding.adapters.lora import SafeLoraLinear

STEPS = 20
CONFIG = SafeConfig(
    warmup=0.2, max_warmup=0.3, freeze_end=0.8, freeze_interval=2, score_interval=1, freeze_by="adapters"
)


class InOrder(Trainer):
    """Batches as they are, without shuffling, so that a raw loop can see the same ones."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(self.train_dataset, batch_size=8, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class Reporter(TrainerCallback):
    """Stands where TensorBoard's callback and its like stand: before the user's own."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer(folder: Path, *callbacks: TrainerCallback, model: Any = None, **options: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    data = [{name: batch[name][row] for name in batch} for batch in batches(STEPS) for row in range(8)]
    model = bert(lora_dropout=0.1) if model is None else model
    return InOrder(model=model, args=args, train_dataset=data, eval_dataset=data[:16], callbacks=list(callbacks))  # type: ignore[arg-type]


def test_a_trainer_and_a_custom_loop_freeze_alike(tmp_path: Path) -> None:
    callback = SafeCallback(CONFIG)
    torch.manual_seed(5)
    trainer(tmp_path, callback, model=bert()).train()
    model = bert()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    freezer = AdapterFreezer(model, optimizer, CONFIG, total_steps=STEPS)
    train(model, optimizer, batches(STEPS), freezer)
    assert len(freezer.frozen) == 9
    ours, theirs = callback.freezer.ledger, freezer.ledger
    assert [(f.step, f.name) for f in ours.freezings] == [(f.step, f.name) for f in theirs.freezings]
    assert ours.importance == pytest.approx(theirs.importance, rel=1e-3)


def test_the_length_of_the_training_comes_from_the_trainer(tmp_path: Path) -> None:
    callback = SafeCallback(CONFIG)
    trainer(tmp_path, callback).train()
    assert callback.freezer.schedule.total_steps == STEPS
    assert callback.report().total_steps == STEPS
    assert {freezing.step for freezing in callback.report().freezings} <= set(range(5, 17))


@pytest.mark.parametrize("attached", ["not", "afterwards", "instead"])
def test_safe_metrics_reach_the_history_and_the_reporters(tmp_path: Path, attached: str) -> None:
    """Without `attach`, those reporters that come after the callback."""

    class After(Reporter):
        pass

    before, callback, after = Reporter(), SafeCallback(CONFIG), After()
    given = [before, after] if attached == "instead" else [before, callback, after]
    run = trainer(tmp_path, *given, eval_strategy="steps", eval_steps=10)
    if attached != "not":
        assert callback.attach(run) is callback
        assert run.callback_handler.callbacks.count(callback) == 1
    run.train()
    histories = (after.logs, run.state.log_history)
    if attached == "not":
        assert not any(name.startswith("safe/") for entry in before.logs for name in entry)
    else:
        histories += (before.logs,)
    for logs in histories:
        training = [entry for entry in logs if "loss" in entry]
        assert [entry["safe/step"] for entry in training] == list(range(1, STEPS + 1))
        assert training[-1]["safe/frozen"] == 9.0 and training[-1]["safe/threshold"] > 0
        assert not any(name.startswith("safe/") for entry in logs if "loss" not in entry for name in entry)


def test_each_freeze_event_is_logged_with_the_bytes_that_a_step_retains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, model = SafeCallback(replace(CONFIG, freeze_by="bytes"), detach=False), bert()
    run = trainer(tmp_path, callback, model=model, logging_steps=STEPS)
    with caplog.at_level(logging.INFO, logger="safe_peft"):
        run.train()
    entries = {entry["step"]: entry for entry in run.state.log_history if "safe/retained_bytes" in entry}
    events = {freezing.step for freezing in callback.freezer.ledger.freezings}
    assert len(events) > 1 and events <= set(entries)
    sizes = [entries[step]["safe/retained_bytes"] for step in sorted(events)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    inputs = next(iter(run.get_train_dataloader()))
    assert sizes[-1] == retained(model, inputs)
    said = [record.message for record in caplog.records if "MiB for backward" in record.message]
    assert [int(text.split()[1].rstrip(":")) for text in said] == sorted(events)
    quiet = trainer(tmp_path, SafeCallback(CONFIG), model=bert(), logging_strategy="no")
    quiet.train()
    assert not any("loss" in entry for entry in quiet.state.log_history)


def test_after_training_the_model_is_the_peft_model_it_was(tmp_path: Path) -> None:
    model = bert(lora_dropout=0.1)
    flags = [p.requires_grad for p in model.parameters()]
    callback = SafeCallback(CONFIG)
    trainer(tmp_path, callback, model=model).train()
    assert sum(type(module) is PeftLinear for module in model.modules()) == 12
    assert [p.requires_grad for p in model.parameters()] == flags
    assert len(callback.report().freezings) == 9


def test_frozen_adapters_may_stay_frozen_on_the_fast_path(tmp_path: Path) -> None:
    model = bert()
    callback = SafeCallback(CONFIG, detach=False)
    trainer(tmp_path, callback, model=model).train()
    assert sum(isinstance(module, SafeLoraLinear) for module in model.modules()) == 12
    assert sum(not adapter.trainable for adapter in callback.freezer.adapters) == 9
    callback.freezer.detach()
    assert all(adapter.trainable for adapter in callback.freezer.adapters)


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_gives_the_same_events(tmp_path: Path, restore: bool) -> None:
    options = {"save_strategy": "steps", "save_steps": 9, "restore_callback_states_from_checkpoint": restore}
    whole = SafeCallback(CONFIG)
    trainer(tmp_path / "whole", whole, **options).train()
    checkpoint = (tmp_path / "whole" / "checkpoint-9").rename(tmp_path / "moved")
    run = trainer(tmp_path / "again", SafeCallback(CONFIG), **options)
    run.train(resume_from_checkpoint=str(checkpoint))
    resumed = next(callback for callback in run.callback_handler.callbacks if isinstance(callback, SafeCallback))
    assert resumed.freezer.ledger == whole.freezer.ledger
    assert len(resumed.freezer.frozen) == 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training at its tenth step."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder, SafeCallback(CONFIG), save_strategy="steps", save_steps=10).train()
    return folder / "checkpoint-10"


def test_a_checkpoint_carries_a_state_a_custom_loop_can_load(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "safe_state.json").read_text())
    model = bert()
    freezer = AdapterFreezer(model, torch.optim.AdamW(model.parameters()), CONFIG, total_steps=STEPS)
    freezer.load_state_dict(state)
    assert freezer.metrics()["safe/step"] == 10.0
    assert 0 < len(freezer.frozen) < 9
    assert (checkpoint / "adapter_model.safetensors").exists()


def test_resuming_with_other_options_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = SafeCallback(SafeConfig.from_dict({**CONFIG.to_dict(), "target_fraction": 0.5}))
    with pytest.raises(StateError, match=r"target_fraction=0\.75 \(here 0\.5\)"):
        trainer(tmp_path, other).train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_from_before_the_method_was_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    callback = SafeCallback(CONFIG)
    run = trainer(tmp_path, callback, save_strategy="steps", save_steps=10)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "has no SAFE state" in caplog.text
    assert callback.freezer.metrics()["safe/step"] == STEPS
    assert len(callback.freezer.frozen) == 9


def test_training_twice_starts_afresh(tmp_path: Path) -> None:
    callback = SafeCallback(CONFIG, detach=False)
    run = trainer(tmp_path, callback)
    run.train()
    first = callback.freezer
    run.train()
    assert callback.freezer is not first
    assert callback.freezer.ledger.scorings[0].step == 1


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = SafeCallback(CONFIG)
    trainer(tmp_path, callback, gradient_accumulation_steps=2, max_steps=10).train()
    assert callback.freezer.metrics()["safe/step"] == 10.0
    assert len(callback.freezer.frozen) == 9


def test_gradient_checkpointing_scores_the_same(tmp_path: Path) -> None:
    """Checkpointing runs each forward twice, which doubles every sum and so changes no importance."""
    ledgers = []
    for checkpointing in (False, True):
        callback = SafeCallback(CONFIG)
        options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer(tmp_path, callback, model=bert(lora_dropout=0.1), **options).train()
        ledgers.append(callback.freezer.ledger)
    assert ledgers[1].frozen == ledgers[0].frozen
    assert ledgers[1].importance == pytest.approx(ledgers[0].importance, rel=1e-3)


def test_the_freezer_before_training_is_asked_for_in_vain() -> None:
    with pytest.raises(BindingError, match=r"Trainer\.train\(\), which makes it"):
        _ = SafeCallback().freezer
