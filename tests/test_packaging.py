"""The set-up ends with one sentence and nothing half-made, whatever is missing; and what is shipped is complete."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("awk", "bash", "cat", "cksum", "df", "dirname", "env", "find", "flock", "getconf", "grep", "head", "make")
TOOLS += ("mkdir", "rm", "sort", "tail", "touch", "uname", "xargs")
SET_UP_HERE = all((ROOT / ".venv" / stamp).exists() for stamp in (".dependencies", ".extension"))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the set-up is a shell script")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the set-up reads."""
    target = tmp_path / "tree"
    target.mkdir()
    for name in ("LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, target)
    for name in (".ci", "csrc", "safe_kernels", "python"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with every command the set-up needs but compilers and Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        path = shutil.which(name)
        if path:
            (folder / name).symlink_to(path)
    return folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def python_and_compiler(folder: Path) -> None:
    (folder / "python3").symlink_to(sys.executable)
    script(folder / "c++", "exit 0")


def make_setup(tree: Path, commands: Path, **environment: str) -> str:
    """Run `make setup`, which must fail, and return its sentence."""
    env = {"PATH": str(commands), "HOME": str(tree), "PIP_CONFIG_FILE": os.devnull} | environment
    done = subprocess.run(["make", "setup"], cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("make setup: ")]
    assert len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tree / ".venv").exists()
    return said[0]


def test_no_compiler(tree: Path, commands: Path) -> None:
    (commands / "python3").symlink_to(sys.executable)
    sentence = make_setup(tree, commands)
    assert "no C++ compiler found (tried: c++ g++ clang++); install one" in sentence


def test_a_compiler_that_was_named_but_is_not_there(tree: Path, commands: Path) -> None:
    python_and_compiler(commands)
    assert "(tried: no-such-compiler)" in make_setup(tree, commands, CXX="no-such-compiler")


@pytest.mark.parametrize("python", [None, "exit 1"])
def test_no_python_that_is_new_enough(tree: Path, commands: Path, python: str | None) -> None:
    script(commands / "c++", "exit 0")
    if python:
        script(commands / "python3", python)
    assert "no Python >= 3.11 found" in make_setup(tree, commands)


def test_too_little_disk(tree: Path, commands: Path) -> None:
    python_and_compiler(commands)
    (commands / "df").unlink()
    script(commands / "df", "echo header; echo /dev/disk 9999 9999 102400 99% /")
    assert "needs 3000 MB of disk and only 100 MB are free" in make_setup(tree, commands)


def test_no_network(tree: Path, commands: Path) -> None:
    with socket.socket() as probe:  # a port of this machine that nobody listens to
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    python_and_compiler(commands)
    index = {"PIP_INDEX_URL": f"http://127.0.0.1:{closed}/simple", "PIP_RETRIES": "1"}
    sentence = make_setup(tree, commands, **index)
    assert "torch could not be installed because the package registry cannot be reached" in sentence


@pytest.mark.skipif(not SET_UP_HERE, reason="`make setup` has not run in this tree")
def test_a_second_run_does_nothing() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "setup"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def run_setup_py(
    tree: Path, *arguments: str, before: str = "pass", **environment: str
) -> subprocess.CompletedProcess[str]:
    run = f"import runpy, sys; sys.argv = ['setup.py', *{list(arguments)!r}]; {before}; runpy.run_path('setup.py')"
    env = os.environ | environment
    return subprocess.run([sys.executable, "-c", run], cwd=tree, env=env, capture_output=True, text=True, timeout=120)


def test_building_without_torch(tree: Path) -> None:
    done = run_setup_py(tree, "build_ext", before="sys.modules['torch'] = None")
    assert done.returncode == 1
    assert done.stderr.startswith("safe_kernels: torch is not installed for ")
    assert "pip install --no-build-isolation -e ." in done.stderr


def test_building_without_a_compiler(tree: Path) -> None:
    done = run_setup_py(tree, "build_ext", CXX="no-such-compiler")
    assert done.returncode == 1
    assert "safe_kernels: no C++ compiler found (CXX='no-such-compiler' names none that exists)" in done.stderr
    assert "Traceback" not in done.stderr


def test_metadata_asks_for_no_compiler(tree: Path) -> None:
    assert run_setup_py(tree, "--version", CXX="no-such-compiler").stdout.strip() == "0.1.0"


def test_a_source_distribution_can_be_built_from(tree: Path) -> None:
    done = run_setup_py(tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    ours = [*(ROOT / "csrc").rglob("*.[ch]*"), ROOT / "safe_kernels/py.typed", ROOT / "python/safe_peft/py.typed"]
    assert {str(path.relative_to(ROOT)) for path in ours} <= names
