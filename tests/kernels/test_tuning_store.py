"""The file of choices: shared by processes that race, crash and disagree, and never trusted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import signal
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

import safe_kernels
from safe_kernels.triton.runtime import tuning
from safe_kernels.triton.runtime import tuning_store as module
from safe_kernels.triton.runtime.tuning_store import Store

HEADER = {"device": "cuda-90-132", "triton": "3.7.1", "code": "abc"}
FORK = multiprocessing.get_context("fork")


def store(folder: Path, **header: str) -> Store:
    return Store(folder / "choices.json", HEADER | header)


def test_another_process_finds_what_was_chosen(tmp_path: Path) -> None:
    assert store(tmp_path / "new").add("key", "64x64") == "64x64"
    assert store(tmp_path / "new").choices == {"key": "64x64"}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["choices.json", "choices.lock"]


def test_a_choice_holds_for_the_process_whatever_others_write(tmp_path: Path) -> None:
    first, second = store(tmp_path), store(tmp_path)
    first.add("key", "64x64")
    second.add("other", "16x16")
    assert second.add("key", "32x32") == "32x32", "it has chosen already, before it could know"
    assert first.add("key", "128x128") == "64x64"
    assert store(tmp_path).choices["other"] == "16x16", "what others wrote is kept"


@pytest.mark.parametrize("changed", ["triton", "device", "code"])
def test_what_was_made_under_other_circumstances_counts_as_absent(tmp_path: Path, changed: str) -> None:
    store(tmp_path).add("key", "64x64")
    other = store(tmp_path, **{changed: "another"})
    assert other.choices == {}
    other.add("new", "16x16")
    assert store(tmp_path, **{changed: "another"}).choices == {"new": "16x16"}


HOSTILE = {
    "torn": b'{"header": {"triton": "3.7',
    "empty": b"",
    "no text": bytes(range(256)),
    "another type": b"[1, 2]",
    "choices of another type": json.dumps({"header": HEADER, "choices": ["64x64"]}).encode(),
    "numbers": json.dumps({"header": HEADER, "choices": {"key": 1}}).encode(),
    "nothing in it": b"{}",
    "deep": b"[" * 100_000,
    "large": b" " * (module.MOST_BYTES + 1),
    "huge number": b'{"choices": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_torn_or_hostile_file_is_ignored_with_one_warning_and_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "choices.json"
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"choices.json cannot be read .* may be deleted") as caught:
        found = store(tmp_path)
        assert found.choices == {}
        found.add("key", "64x64")
    assert len(caught) == 1
    assert store(tmp_path).choices == {"key": "64x64"}


def test_a_folder_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = store(tmp_path / "file" / "below")
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        found.add("key", "64x64")
        found.add("other", "16x16")
    assert len(caught) == 1
    assert found.choices == {"key": "64x64", "other": "16x16"}


def test_a_lock_that_is_never_given_back_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.0)
    found = store(tmp_path)
    with module.FileLock(tmp_path / "choices.lock"), pytest.warns(RuntimeWarning, match="cannot be written"):
        found.add("key", "64x64")
    assert found.choices == {"key": "64x64"}


def _add(folder: Path, name: str, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = store(folder)
        for index in range(count):
            found.add(f"{name} {index}", "64x64")


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    workers = [FORK.Process(target=_add, args=(tmp_path, str(name), 8)) for name in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(store(tmp_path).choices) == 32


def _die_while_writing(folder: Path) -> None:
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    store(folder).add("dead", "64x64")


def test_a_process_killed_while_it_writes_leaves_the_file_and_the_lock_to_others(tmp_path: Path) -> None:
    store(tmp_path).add("before", "64x64")
    worker = FORK.Process(target=_die_while_writing, args=(tmp_path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    _add(tmp_path, "after", 1)
    assert set(store(tmp_path).choices) == {"before", "after 0"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choices.json", "choices.lock"]


def test_it_is_off_by_default_and_a_function_and_a_context_manager(tmp_path: Path) -> None:
    assert tuning.active() is None
    with safe_kernels.autotune(cache=tmp_path):
        outer = tuning.active()
        assert outer is not None and outer.folder == tmp_path
        with safe_kernels.autotune(False):
            assert tuning.active() is None
        assert tuning.active() is outer
    assert tuning.active() is None
    safe_kernels.autotune(cache=tmp_path)
    assert tuning.active() is outer, "what was remembered is there again"
    safe_kernels.autotune(False)
    assert tuning.active() is None
    assert list(tmp_path.iterdir()) == [], "nothing is written before something is measured"


def test_the_cache_is_where_the_models_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path))
    assert tuning.folder(None) == tmp_path
    monkeypatch.delenv("SAFE_KERNELS_CACHE")
    assert tuning.folder(None) == Path.home() / ".cache" / "safe_kernels"
    assert tuning.folder("~/here") == Path.home() / "here"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cache must be a folder, got the file"):
        safe_kernels.autotune(cache=tmp_path / "file")
    with pytest.raises(TypeError, match="cache must be the path of a folder or None, got int"):
        safe_kernels.autotune(cache=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="enabled must be True or False, got 'folder'"):
        safe_kernels.autotune("folder")  # type: ignore[arg-type]
    assert tuning.active() is None


def test_what_is_remembered_is_counted_by_device(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert tuning.remembered(tmp_path) == {}
    Store(*tuning._place(tmp_path, "cuda-90-132")).add("key", "64x64")
    Store(tmp_path / "autotune-cuda-80-108.json", {"triton": "1.0"}).add("key", "64x64")
    assert tuning.remembered(tmp_path) == {"cuda-90-132": 1}


def test_the_version_of_what_was_stored_is_of_every_file_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), b"")[1])
    tuning._code.__wrapped__()
    modules = pkgutil.walk_packages(safe_kernels.triton.__path__, "safe_kernels.triton.")
    names = {"safe_kernels.triton", *(module.name for module in modules)}
    assert {find_spec(name).origin for name in names} == set(map(str, read))  # type: ignore[union-attr]
