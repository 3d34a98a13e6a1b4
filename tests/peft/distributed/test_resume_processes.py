"""A Trainer on two processes that is killed, and killed again, ends with the bits of the one that was not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from killed import CONFIG, SAVE_AT, SAVE_STEPS, STEPS, callback_of, die, trainer
from ranks import mend_versions, outcomes_of, together
from transformers import TrainerCallback

from safe_peft import last_checkpoint
from safe_peft.files import jsonio

KILLED_AT = SAVE_AT + 2


class Dying(TrainerCallback):
    """Kills its process when a step begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED_AT:
            die()


def die_in_save() -> None:
    """Die before the random state is written: the last file of this process, next to those of the first one."""
    save = torch.save

    def saving(parts: Any, path: Any, **options: Any) -> None:
        if Path(path).name == "rng_state_1.pth" and Path(path).parent.name == f"checkpoint-{SAVE_AT}":
            die()
        save(parts, path, **options)

    torch.save = saving


def train(rank: int, folder: str, how: str) -> dict[str, Any]:
    callbacks = [Dying()] if how == "at a step" else []
    if how == "in a save" and rank == 1:
        die_in_save()
    run = trainer(Path(folder), CONFIG, *callbacks)
    mend_versions()
    found = last_checkpoint(folder)
    run.train(resume_from_checkpoint=found)
    weights = run.model.state_dict()
    return {
        "from": found and Path(found).name,
        "ledger": jsonio.encode(callback_of(run).freezer.ledger),
        "bits": {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in weights.items()},
    }


def test_processes_that_are_killed_go_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = together(train, str(tmp_path / "whole"), "never")
    assert whole[0] == whole[1] and {event["step"] for event in whole[0]["ledger"]["freezings"]} == {SAVE_AT, 8, 10}
    folder = str(tmp_path / "killed")
    (_, first), (_, second) = outcomes_of(train, folder, "in a save", gloo_seconds=10)
    assert second == "died" and first is not None and "RuntimeError" in first
    assert (tmp_path / "killed" / f"checkpoint-{SAVE_AT}" / "trainer_state.json").exists()
    assert str(last_checkpoint(folder)).endswith(f"checkpoint-{SAVE_AT - SAVE_STEPS}"), "the other is not whole"
    errors = [error for _, error in outcomes_of(train, folder, "at a step", gloo_seconds=10)]
    assert "died" in errors and all(errors), "the other one may have lost its peer before it came to that"
    ended = together(train, folder, "never")
    assert [rank.pop("from") for rank in ended] == [f"checkpoint-{SAVE_AT}"] * 2
    for rank in ended:
        assert rank == {name: whole[0][name] for name in rank}
    assert str(last_checkpoint(folder)).endswith(f"checkpoint-{STEPS}")
