"""Every command in the README and the docs is parsed by what it calls, to the point where the work would begin."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import bench_peak
import pytest
from torch.distributed.run import get_args_parser
from typer.core import TyperCommand

from safe_peft.cli.main import app

ROOT = Path(__file__).parents[1]
PROGRAMS = ("safe-peft", "make", "torchrun", "python", "pytest", "bash")


def commands(page: Path) -> list[str]:
    """Those of its console blocks, and those with arguments that stand in a sentence."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    in_blocks = re.findall(r"^\$ (.*)$", blocks, flags=re.MULTILINE)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    in_prose = re.findall(rf"`((?:{'|'.join(PROGRAMS[1:])}) [^`]+)`", prose)
    return [*in_blocks, *in_prose]


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    pytest.param(shlex.split(line, comments=True), id=f"{page.name}-{line[:50]}")
    for page in PAGES
    for line in dict.fromkeys(commands(page))
]


class ParsedError(Exception):
    """Raised where the work would begin."""


def stop(*args: Any, **options: Any) -> NoReturn:
    raise ParsedError


@pytest.fixture(autouse=True)
def _only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        parse(parser, *args, **options)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(TyperCommand, "invoke", stop)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets one of its own


def call(program: str, args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise ParsedError, or SystemExit with what is wrong."""
    if program == "safe-peft":
        app(args)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{args[0]}:", makefile, flags=re.MULTILINE), f"there is no target {args[0]}"
        more = [word.removeprefix("ARGS=") for word in args[1:] if word.startswith("ARGS=")]
        if args[0] == "demo" and more:
            call("python", ["examples/demo.py", *shlex.split(*more)], monkeypatch)
        stop()
    elif program == "torchrun":
        with pytest.raises(ParsedError):
            get_args_parser().parse_args(args)
        script = next(index for index, word in enumerate(args) if word.endswith(".py"))
        call("python", args[script:], monkeypatch)
    elif program == "python" and args[:2] == ["-m", "pip"]:
        # In a process of its own: pip takes setuptools' distutils away from the process that imports it.
        assert subprocess.run([sys.executable, *args, "--help"], capture_output=True).returncode == 0
        stop()
    elif program == "python" and args[0] == "-m":
        monkeypatch.setattr(sys, "argv", args[1:])
        monkeypatch.syspath_prepend(str(ROOT))
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    elif program == "python":
        monkeypatch.setattr(sys, "argv", args)
        runpy.run_path(str(ROOT / args[0]), run_name="__main__")
    else:
        files = [word for word in args if "/" in word]
        assert files and all((ROOT / name.partition("::")[0]).exists() for name in files), args
        stop()


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *args = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word) or word.startswith("ARGS=")]
    with pytest.raises((ParsedError, SystemExit)) as stopped:
        call(program, args, monkeypatch)
    assert getattr(stopped.value, "code", 0) == 0, "it would not have begun"


@pytest.mark.parametrize(
    "line",
    [
        "safe-peft doctor --speed",
        "safe-peft finetun",
        "torchrun --nproc-per-node 2 examples/torchrun.py --stepz 1",
        "torchrun --processes 2 examples/torchrun.py",
        "python examples/causal_lm.py --tokens 5",
        "python -m bench.gpu.planned --sizes 70B",
    ],
)
def test_a_wrong_one_does_not(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(line.split()[0], line.split()[1:], monkeypatch)
    assert stopped.value.code == 2


def test_the_process_of_the_memory_benchmark_starts() -> None:
    assert "--provider" in bench_peak.start("--help")


def test_there_are_commands() -> None:
    found = {parameter.values[0][0] for parameter in COMMANDS}
    assert {"safe-peft", "make", "torchrun", "python"} <= found
