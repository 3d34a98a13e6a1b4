"""The prefix cache inside whole trainings: raw loop, Trainer, processes, a kill."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from killed import callback_of, trainer
from ranks import each_together, together
from tiny import adamw, batches, bert, train
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from safe_peft import AdapterFreezer, ConfigError, SafeConfig, last_checkpoint

SCHEDULE: dict[str, Any] = {
    "warmup": 2,
    "max_warmup": 3,
    "freeze_end": 10,
    "freeze_interval": 2,
    "score_interval": 2,
    "target_fraction": 0.6,
}
CACHED = {**SCHEDULE, "prefix_cache": "1MiB"}


def loop(options: dict[str, Any], epochs: int = 4) -> tuple[AdapterFreezer, list[float], dict[str, Tensor]]:
    model = bert(4)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**options), total_steps=8 * epochs)
    losses = train(model, optimizer, iter([*batches(8)] * epochs), freezer)
    return freezer, losses, model.state_dict()


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def test_a_loop_freezes_the_same_and_learns_the_same_with_fewer_calls() -> None:
    plain, losses, weights = loop(SCHEDULE)
    cached, others, same = loop(CACHED)
    assert [one.name for one in cached.ledger.freezings] == [one.name for one in plain.ledger.freezings]
    assert others == pytest.approx(losses, rel=1e-4)
    close(weights, same)
    metrics = cached.metrics()
    assert metrics["safe/prefix_known"] > 0.3 and metrics["safe/prefix_bytes"] > 0
    assert cached.prefix is not None and plain.prefix is None
    cached.detach()
    assert cached.prefix.store.bytes == 0


def test_a_forgotten_freezer_leaves_no_cache() -> None:
    import gc

    model = bert(4)
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**CACHED), total_steps=16)
    prefix = freezer.prefix
    del freezer
    gc.collect()
    assert prefix is not None and not prefix.store.put("a", 0, torch.ones(1))
    assert model(**next(batches(1))).loss.requires_grad


@pytest.mark.parametrize(
    ("name", "value"),
    [("prefix_cache", "much"), ("prefix_file", 0), ("prefix_dropout", "off"), ("prefix_dropout", False)],
)
def test_a_wrong_option_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        SafeConfig(**{name: value})


# ---------------------------------------------------------------- Trainer


def run(folder: Path, options: dict[str, Any], *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    given = {"max_steps": 28, "save_steps": 10, "eval_strategy": "steps", "eval_steps": 9, **arguments}
    return trainer(folder, SafeConfig(**options), *callbacks, **given)


def test_a_trainer_with_accumulation_and_evaluation(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", SCHEDULE)
    plain.train()
    cached = run(tmp_path / "cached", CACHED)  # sets the seed again
    cached.train()
    prefix = callback_of(cached).freezer.prefix
    assert prefix is not None and prefix.usage.known > 0
    for one, other in zip(plain.state.log_history, cached.state.log_history, strict=True):
        for name in {"loss", "eval_loss"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=1e-3)
    close(plain.model.state_dict(), cached.model.state_dict())


class Dies(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 22:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder: Path) -> None:
    run(folder, CACHED, Dies()).train()


def test_a_training_killed_with_a_warm_cache_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", CACHED)
    whole.train()
    assert forks.call(train_until_killed, tmp_path / "killed").code == -signal.SIGKILL
    again = run(tmp_path / "killed", CACHED)
    again.train(resume_from_checkpoint=last_checkpoint(tmp_path / "killed"))
    assert callback_of(again).freezer.ledger == callback_of(whole).freezer.ledger
    close(whole.model.state_dict(), again.model.state_dict())


# ---------------------------------------------------------------- processes


def train_moving(rank: int, options: dict[str, Any]) -> tuple[list[float], int, int]:
    """Every batch goes to the other process in the next epoch."""
    model = bert(4)
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**options), total_steps=16)
    data = list(batches(8))
    order = [data[(2 * step + rank + epoch) % 8] for epoch in range(4) for step in range(4)]
    losses = train(ddp, optimizer, iter(order), freezer)
    usage = freezer.prefix.usage if freezer.prefix is not None else None
    return losses, (usage.known if usage else 0), (usage.samples if usage else 0)


def test_samples_that_move_from_process_to_process() -> None:
    plain, cached = each_together(train_moving, [(SCHEDULE,), (CACHED,)])
    for (losses, _, _), (others, known, samples) in zip(plain, cached, strict=True):
        assert others == pytest.approx(losses, rel=1e-4)
        assert known > 0.2 * samples, (known, samples)


def train_sharded(rank: int) -> tuple[int, str]:
    model = bert(4)
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**CACHED), total_steps=16)
    train(model, optimizer, iter([*batches(4)] * 4), freezer)
    assert freezer.prefix is not None
    return freezer.prefix.usage.known, freezer.prefix.usage.reason


def test_fsdp2_runs_all_blocks() -> None:
    for known, reason in together(train_sharded):
        assert known == 0 and "there are hooks on a" in reason
