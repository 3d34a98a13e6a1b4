"""A training killed at any operation on files of a save goes on to the same weights, to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path

import forks
import pytest
import torch
from killed import CONFIG, KILLS, SAVE_AT, SAVE_STEPS, STEPS, TORN, RawLoop, callback_of, main, trainer
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint as newest

from safe_peft import last_checkpoint
from safe_peft.freezing.ledger import Ledger

EXACT = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the trainings left behind."""
    folder = tmp_path_factory.mktemp("killed")
    done = forks.call(main, folder)
    assert done.code == -signal.SIGKILL, done.error
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Ledger]:
    """The same training, never killed: its checkpoints, its weights and its events."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    ledger = callback_of(run).freezer.ledger
    assert {SAVE_AT, 8, 10} == {freezing.step for freezing in ledger.freezings}
    return folder, run.model.state_dict(), ledger


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def ways(killed: Path, kind: str) -> list[Path]:
    return [killed / f"{kind}-{number}" for number in (*range(KILLS[kind]), TORN)]


def test_wherever_a_trainers_save_is_killed_a_whole_checkpoint_is_found(
    killed: Path, whole: tuple[Path, dict[str, Tensor], Ledger]
) -> None:
    found = [last_checkpoint(folder) for folder in ways(killed, "trainer")]
    for path in found:
        assert path is not None
        right = whole[0] / Path(path).name
        assert all(Path(path, name).read_bytes() == (right / name).read_bytes() for name in EXACT)
    steps = {Path(path).name for path in found if path}
    assert steps == {f"checkpoint-{SAVE_AT - SAVE_STEPS}", f"checkpoint-{SAVE_AT}"}
    torn = [path for path, folder in zip(found, ways(killed, "trainer"), strict=True) if path != newest(folder)]
    assert len(torn) > 5, "transformers' own function would take these"


@pytest.mark.parametrize("way", ["mid-save", "unsigned", "half a file", "at a step"])
def test_a_killed_trainer_goes_on_to_the_same_bits(
    killed: Path, whole: tuple[Path, dict[str, Tensor], Ledger], way: str
) -> None:
    torn = [
        folder
        for folder in ways(killed, "trainer")[:-1]
        if (folder / f"checkpoint-{SAVE_AT}" / "optimizer.pt").exists()
    ]
    unsigned = [
        folder for folder in torn if not (folder / f"checkpoint-{SAVE_AT - SAVE_STEPS}" / "safe_state.json").exists()
    ]
    folder = {
        "mid-save": torn[0],
        "unsigned": unsigned[0],
        "half a file": killed / f"trainer-{TORN}",
        "at a step": killed / "trainer",
    }[way]
    run = trainer(folder)
    run.train(resume_from_checkpoint=last_checkpoint(folder))
    assert callback_of(run).freezer.ledger == whole[2]
    assert same(run.model.state_dict(), whole[1])
    assert last_checkpoint(folder) == str(folder / f"checkpoint-{STEPS}")


def test_a_killed_custom_loop_goes_on_to_the_same_bits(killed: Path, tmp_path: Path) -> None:
    loop = RawLoop(tmp_path).run()
    ledger, weights = loop.freezer.ledger, loop.model.state_dict()
    folders = ways(killed, "raw")
    resumed_from = {last_checkpoint(folder): folder for folder in folders}
    assert {Path(str(path)).name for path in resumed_from} == {"checkpoint-12", "checkpoint-13"}
    by_name = {Path(str(path)).name: folder for path, folder in resumed_from.items()}
    for folder in (*by_name.values(), killed / f"raw-{TORN}"):
        again = RawLoop(folder).resume().run()
        assert again.freezer.ledger == ledger
        assert same(again.model.state_dict(), weights)
    assert len(ledger.freezings) == 9 and CONFIG.freeze_end == 10
