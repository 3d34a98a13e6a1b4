"""State files: written whole or not at all, and refused when they are damaged or belong to something else."""

from __future__ import annotations

import ast
import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import RawLoop, Rows
from tiny import BERT_TARGETS, EARLY, adamw, batches, bert, gpt2, run, train
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from safe_kernels.reference import MASK_VERSION
from safe_peft import AdapterFreezer, SafeCallback, SafeConfig, StateError, last_checkpoint
from safe_peft.files.checkpoints import checkpoint_files
from safe_peft.freezing.state import VERSION


def fresh(
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, score_blocks: int = 4, **lora: Any
) -> AdapterFreezer:
    model = bert(**lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdapterFreezer(model, optimizer(trained, lr=1e-3), SafeConfig(**EARLY, score_blocks=score_blocks))


@pytest.fixture(scope="module")
def freezer() -> AdapterFreezer:
    """After nine steps, some of whose adapters are frozen."""
    torch.set_num_threads(1)
    found = run(9)[2]
    assert found.frozen
    return found


def test_what_is_saved_is_loaded(freezer: AdapterFreezer, tmp_path: Path) -> None:
    freezer.save(tmp_path / "new" / "safe.json")
    again = fresh()
    again.load(str(tmp_path / "new" / "safe.json"))
    assert again.state_dict() == freezer.state_dict()
    assert again.frozen == freezer.frozen
    assert [adapter.trainable for adapter in again.adapters] == [a.name not in freezer.frozen for a in again.adapters]


def test_loading_an_earlier_state_thaws_what_froze_later() -> None:
    model = bert(lora_dropout=0.1)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    start = freezer.state_dict()
    train(model, optimizer, batches(16), freezer)
    freezer.load_state_dict(start)
    assert not freezer.frozen and all(adapter.trainable for adapter in freezer.adapters)
    assert all(dropout.p == 0.1 for adapter in freezer.adapters for dropout in adapter.dropouts())


def test_a_state_that_an_earlier_safe_peft_saved_is_loaded(tmp_path: Path) -> None:
    """Within an accumulation and a scoring step, with frozen adapters, a plan and a checksum of its own."""
    path = Path(__file__).with_name("state_version_4.json")
    saved = json.loads(path.read_text())
    config = {name: value for name, value in saved["config"].items() if name not in ("target_fraction", "target")}
    loop = RawLoop(tmp_path, SafeConfig.from_dict(config)).run(1)
    loop.freezer.load(path)
    assert len(loop.freezer.frozen) == 9 and any(map(any, saved["evidence"]["sums"]))
    own, theirs = loop.freezer.state_dict(), {name: value for name, value in saved.items() if name != "sha256"}
    newer = {
        "freeze_by": "bytes",
        "policy": "greedy",
        "prefix_cache": None,
        "prefix_file": None,
        "prefix_dropout": True,
    }
    assert own.pop("config") == newer | {n: v for n, v in theirs.pop("config").items() if n != "target"}
    assert own == theirs | {"memory": {}, "mask_version": MASK_VERSION}
    loop.run(12)
    assert loop.freezer.state_dict()["step"] > saved["step"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("saved", [None, 1, MASK_VERSION, MASK_VERSION + 1])
def test_other_dropout_masks_than_the_saved_ones_are_said(
    saved: int | None, dropout_p: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A state without a version is from before there was one: 1."""
    freezer = fresh(lora_dropout=dropout_p)
    state = freezer.state_dict()
    assert state.pop("mask_version") == MASK_VERSION
    with caplog.at_level(logging.WARNING, logger="safe_peft"):
        freezer.load_state_dict(state | ({} if saved is None else {"mask_version": saved}))
    says = f"version {saved or 1} of dropout's masks, now it is {MASK_VERSION}: from here on dropout differs"
    assert (says in caplog.text) == (dropout_p > 0 and saved != MASK_VERSION)
    assert freezer.state_dict() == state | {"mask_version": MASK_VERSION}


# ---------------------------------------------------------------- writing


def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    freezer: AdapterFreezer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "safe.json"
    freezer.save(path)
    old = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match=r"safe\.json cannot be written: No space left on device"):
        freezer.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_folder_and_a_place_that_cannot_be_are_refused(freezer: AdapterFreezer, tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "folder", tmp_path / "file" / "safe.json"):
        with pytest.raises(StateError, match="cannot be written"):
            freezer.save(path)
    assert (tmp_path / "folder" / "inside").is_dir() and (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    with pytest.raises(StateError, match="cannot be read: Is a directory"):
        freezer.load(tmp_path / "folder")
    with pytest.raises(StateError, match="does not exist"):
        freezer.load(tmp_path / "nothing.json")


def test_a_folder_that_may_not_be_written_to_is_refused(
    freezer: AdapterFreezer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, who may write everywhere
    with pytest.raises(StateError, match="Permission denied"):
        freezer.save(tmp_path / "safe.json")


def test_the_file_and_its_folder_are_on_the_disk_before_and_after_the_move(
    freezer: AdapterFreezer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync, move = os.fsync, os.replace

    def synced(handle: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *args: (events.append("move"), move(*args)))
    freezer.save(tmp_path / "safe.json")
    assert events == ["file", "move", "folder"]


def test_nothing_here_is_pickled() -> None:
    """Neither our files nor those we read: pickle runs what a file says."""
    root = Path(__file__).parents[3]
    for path in [*(root / "python").rglob("*.py"), *(root / "safe_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("torch.save", "torch.load", "np.load", "numpy.load"), path


# ---------------------------------------------------------------- of something else


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        (
            {"r": 8, "lora_alpha": 16},
            r"adapters: bert\.encoder.*query had r=4 \(here 8\), shapes=.*11 more differ",
        ),
        ({"lora_alpha": 16}, r"query had scaling=2\.0 \(here 4\.0\), and 11 more"),
        ({"use_rslora": True}, r"had scaling=2\.0 \(here 4\.0\)"),
        ({"target_modules": BERT_TARGETS[1:]}, r"12 adapters, .* has 10: the state lacks \[\] and has \['bert.*query"),
        ({"layers": 3}, r"12 adapters, but this model has 18: the state lacks \['bert\.encoder\.layer\.2"),
        ({"optimizer": torch.optim.SGD}, r"saved with the optimizer AdamW, but this training uses SGD"),
        ({"score_blocks": 2}, r"saved with other options: score_blocks=4 \(here 2\)"),
    ],
)
def test_a_state_of_another_training_is_refused_and_the_difference_named(
    freezer: AdapterFreezer, lora: dict[str, Any], says: str
) -> None:
    other = fresh(**lora)
    before = other.state_dict()
    with pytest.raises(StateError, match=says):
        other.load_state_dict(freezer.state_dict())
    assert other.state_dict() == before and all(adapter.trainable for adapter in other.adapters)


def test_a_state_of_another_model_is_refused(freezer: AdapterFreezer) -> None:
    model = gpt2()
    with pytest.raises(StateError, match=r"the state lacks \['transformer\.h\.0"):
        AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).load_state_dict(freezer.state_dict())


def test_another_version_is_refused_by_its_number(freezer: AdapterFreezer) -> None:
    for version in (VERSION - 1, VERSION + 1, "3", None):
        with pytest.raises(StateError, match=rf"its version is .*reads only version {VERSION}"):
            freezer.load_state_dict({**freezer.state_dict(), "version": version})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: {}, "state: this is not a freezer's state; pass the output of state_dict"),
        (lambda state: [state], "state: this is not a freezer's state; pass the output of state_dict"),
        (lambda state: {**state, "step": "9"}, "state.step: expected int, got '9'; the file is damaged"),
        (lambda state: {**state, "ledger": []}, r"state.ledger: expected Ledger, got \[\]"),
        (lambda state: {**state, "config": []}, r"state.config: expected dict.*, got \[\]"),
        (lambda state: {name: state[name] for name in state if name != "planned"}, "state lacks planned"),
        (lambda state: {**state, "evidence": {"sum": []}}, "state.evidence has sum, which is unknown"),
    ],
)
def test_a_part_that_is_missing_or_of_another_type_is_named_and_changes_nothing(
    freezer: AdapterFreezer, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    other = fresh()
    with pytest.raises(StateError, match=says):
        other.load_state_dict(change(freezer.state_dict()))
    assert not other.frozen and other.metrics()["safe/step"] == 0.0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_short_is_refused_and_named(freezer: AdapterFreezer, tmp_path: Path, share: float) -> None:
    path = tmp_path / "safe.json"
    freezer.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    other = fresh()
    with pytest.raises(StateError, match=r"safe\.json is not JSON"):
        other.load(path)
    assert not other.frozen


def test_a_callback_of_ones_own_kind_goes_on_too(freezer: AdapterFreezer, tmp_path: Path) -> None:
    class Mine(SafeCallback):
        pass

    callback, model = Mine(SafeConfig(**EARLY)), bert()
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    saved = {"Mine": [{"attributes": {"saved": freezer.state_dict()}}]}
    state = TrainerState(global_step=9, max_steps=16, stateful_callbacks=saved)
    callback.on_train_begin(args, state, TrainerControl(), model=model, optimizer=adamw(model))
    assert callback.freezer.frozen == freezer.frozen
    callback.freezer.detach()


# ---------------------------------------------------------------- the last checkpoint


def checkpoint(freezer: AdapterFreezer, folder: Path, step: int) -> Path:
    part = folder / f"checkpoint-{step}"
    (part / "below").mkdir(parents=True)
    (part / "weights.bin").write_bytes(bytes(range(200)))
    (part / "below" / "more.json").write_text("{}")
    freezer.save(part / "safe_state.json", files=[part / "weights.bin", str(part / "below" / "more.json")])
    return part


def test_the_newest_whole_checkpoint_is_found(
    freezer: AdapterFreezer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nothing") is None
    parts = {step: checkpoint(freezer, tmp_path, step) for step in (9, 10, 11, 100)}
    for name in ("checkpoint-x", "checkpoint-12.tmp", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-300").write_text("no folder")
    assert last_checkpoint(str(tmp_path)) == str(parts[100]) and not caplog.text
    (parts[100] / "below" / "more.json").unlink()
    (parts[11] / "weights.bin").write_bytes(bytes(range(199)) + b"x")
    path = parts[10] / "safe_state.json"
    path.write_bytes(path.read_bytes()[:-3])
    assert last_checkpoint(tmp_path) == str(parts[9])
    for says in ("more.json is missing", "weights.bin has changed since it was written", "is not JSON"):
        assert says in caplog.text
    fresh().load(parts[9] / "safe_state.json")
    assert parts[100].exists() and parts[10].exists(), "nothing is deleted"


def test_what_makes_a_checkpoint_whole(freezer: AdapterFreezer, tmp_path: Path) -> None:
    """With torch.distributed's index, without what nobody would miss."""
    part = checkpoint(freezer, tmp_path, 3)
    (part / "optimizer_0").mkdir()
    wanted = [part / "below" / "more.json", part / "optimizer_0" / ".metadata", part / "weights.bin"]
    for path in (wanted[1], part / "README.md", part / ".safe_state-x.json", part / ".nfs01"):
        path.write_text("x")
    assert checkpoint_files(part) == wanted
    freezer.save(part / "safe_state.json", files=wanted)
    assert last_checkpoint(tmp_path) == str(part)
    wanted[1].unlink()
    assert last_checkpoint(tmp_path) is None


def test_files_that_are_not_there_are_refused(freezer: AdapterFreezer, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("nothing", "../elsewhere"):
        with pytest.raises(StateError, match=r"files: .*name existing files in .*checkpoint-3 or below"):
            freezer.save(tmp_path / "checkpoint-3" / "safe_state.json", files=[tmp_path / "checkpoint-3" / name])
    assert not list((tmp_path / "checkpoint-3").iterdir())


def test_a_trainers_checkpoint_without_ours_is_judged_by_what_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From before the method was used, or from between a Trainer's last file and ours."""
    caplog.set_level(logging.WARNING, "safe_peft")
    args = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, report_to="none", use_cpu=True)
    Trainer(model=bert(), args=args, train_dataset=Rows()).train()
    part = tmp_path / "checkpoint-2"
    state = (part / "trainer_state.json").read_text()
    (part / "trainer_state.json").write_text(state.replace('"global_step"', '"loss": NaN, "global_step"', 1))
    assert last_checkpoint(tmp_path) == str(part)
    for name in ("optimizer.pt", "adapter_model.safetensors", "trainer_state.json"):
        whole = (part / name).read_bytes()
        (part / name).write_bytes(whole[: len(whole) // 2])
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1"), name
        (part / name).write_bytes(whole)
    assert last_checkpoint(tmp_path) == str(part)
    part.rename(tmp_path / "checkpoint-7")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "trainer_state.json is not of step 7" in caplog.text


def test_a_checkpoint_that_lacks_a_processs_part_is_not_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that died on the way to ours: the first one has written all of its own."""
    part = tmp_path / "checkpoint-4"
    part.mkdir()
    attributes = {"saved": {}, "processes": 3}
    state = {"global_step": 4, "stateful_callbacks": {"SafeCallback": {"attributes": attributes}, "Other": [{}]}}
    (part / "trainer_state.json").write_text(json.dumps(state))
    for index in range(3):
        assert last_checkpoint(tmp_path) is None
        assert f"rng_state_{index}.pth is missing: not all 3 processes" in caplog.text
        torch.save({}, part / f"rng_state_{index}.pth")
    assert last_checkpoint(tmp_path) == str(part)


def test_ours_is_written_when_every_process_has_written_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freezer: AdapterFreezer
) -> None:
    part = tmp_path / "checkpoint-4"
    part.mkdir()
    callback = SafeCallback()
    monkeypatch.setattr(callback, "_freezer", freezer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: (part / "rng_state_1.pth").write_text("of another"))
    args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    callback.on_save(args, TrainerState(global_step=4), TrainerControl())
    assert list(json.loads((part / "safe_state.json").read_text())["files"]) == ["rng_state_1.pth"]
    assert callback.state()["attributes"]["processes"] == 2
