"""bench/gpu.sh gets one chance on a GPU: whatever fails or ends it, what was measured is in its JSON."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu import machine, ops
from gpu.op_cases import Case
from gpu.results import AGAIN, PARTS, read, update
from gpu_cases import Case as Check
from gpu_cases import Normal
from gpu_checks import problems

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHON": sys.executable,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
    "OMP_NUM_THREADS": "1",
}


def script(out: Path, **environment: str) -> subprocess.Popen[str]:
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--dry-run", "--out", str(out)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**ENVIRONMENT, **environment}, **streams)


def stand_in(folder: Path, case: str) -> str:
    """A Python whose parts all succeed at once, but for the case."""
    python = folder / "python"
    real = f'*results | *summary) exec {shlex.quote(sys.executable)} "$@" ;;'
    python.write_text(f'#!/bin/sh\ncase "$2" in {real} {case} esac\n')
    python.chmod(0o755)
    return str(python)


def await_checks(out: Path, is_running: Callable[[], bool]) -> None:
    """Until some checks are done."""
    give_up = time.monotonic() + 120
    while not (out.exists() and read(out)["parts"]["check"].get("checked", 0) > 2):
        assert is_running() and time.monotonic() < give_up
        time.sleep(0.05)


def test_every_part_is_named_even_if_there_is_no_time_for_it(tmp_path: Path) -> None:
    running = script(tmp_path / "out.json", BUDGET="0")
    printed, _ = running.communicate(timeout=60)
    whole = json.loads((tmp_path / "out.json").read_text())
    assert running.returncode == 0, printed
    assert whole["run"] == {"dry_run": True, "budget_s": 0}
    assert tuple(whole["parts"]) == PARTS
    assert all(part["status"].startswith("not run") for part in whole["parts"].values())
    assert all(f"\n{name} " in printed for name in PARTS)


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    running = script(tmp_path / "out.json", PYTHON=stand_in(tmp_path, "pytest) exit 1 ;;"))
    printed, _ = running.communicate(timeout=60)
    status = {name: part["status"] for name, part in read(tmp_path / "out.json")["parts"].items()}
    assert running.returncode == 1, printed
    assert {status[name] for name in ("check", "check_large", "check_tuned")} == {"failed with exit status 1"}
    assert {status[name] for name in ("warm", "ops", "steps", "ops_tuned")} == {"ok"}


def test_a_script_that_is_told_to_stop_prints_what_there_is(tmp_path: Path) -> None:
    running = script(tmp_path / "out.json", ONLY="check")
    await_checks(tmp_path / "out.json", lambda: running.poll() is None)
    running.terminate()
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    assert "check        stopped with the script; checked " in printed
    assert read(tmp_path / "out.json")["machine"]["gpu"] == "none (dry run)"


def checks(out: Path, tests: str, **environment: str) -> BaseProcess:
    """Tests, recorded as the script records those on a GPU; in a fork, which has imported everything."""
    (path := out.with_name("test_some.py")).write_text(tests)
    options = ["-p", "bench.gpu.checks", str(path), "--dry-run", "--out", str(out), "--part", "check"]

    def run() -> None:
        os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}
        sys.path.insert(0, str(ROOT))
        sys.exit(pytest.main(options))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def code_of(process: BaseProcess) -> int | None:
    process.join()
    return process.exitcode


def test_a_part_that_is_killed_leaves_what_it_measured(tmp_path: Path) -> None:
    lasting = "import pytest, time\n@pytest.mark.parametrize('n', range(5))\ndef test_a(n): time.sleep(n // 4 * 99)\n"
    running = checks(tmp_path / "out.json", lasting)
    await_checks(tmp_path / "out.json", running.is_alive)
    running.kill()
    assert code_of(running) == -signal.SIGKILL
    assert read(tmp_path / "out.json")["parts"]["check"]["wrong"] == {}


def test_a_provider_that_cannot_run_says_why() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory\nand a long story")

    case = Case("case", {}, {"good": lambda: None, "bad": fails}, [], {})
    found = {provider: ops.measure_one(case, provider, torch.device("cpu")) for provider in case.runs}
    assert found["bad"] == {"error": "RuntimeError: out of memory"}
    assert found["good"]["runs"] == 3


def test_a_check_that_fails_says_what_is_wrong() -> None:
    calls = iter(range(4))
    drifting = Check("drifting", lambda x: x * (1.0 + 0.1 * next(calls)), [Normal((4,), torch.float32)])
    wrong = problems(drifting, torch.device("cpu"))
    assert any("against float64" in problem for problem in wrong)
    assert any("other bits in a second run" in problem for problem in wrong)


def test_a_part_that_has_no_time_left_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADLINE", str(time.time()))
    noted: dict[str, Any] = {}
    limits = {"copy_GB_s": 1.0, "bf16_TFLOP_s": 1.0}
    rows: dict[Any, dict[str, Any]] = {}
    ops.measure(torch.device("cpu"), True, lambda provider: True, rows, limits, lambda **facts: noted.update(facts))
    assert not rows
    assert noted["left_out"].startswith("from lora forward")


FAULTY = """
def test_a() -> None:
    pass

def test_b() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_c() -> None:
    assert False, "another reason\\nand a long story"
"""


def test_after_a_fault_another_process_goes_on_behind_it(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert code_of(checks(out, FAULTY)) == AGAIN
    assert read(out)["parts"]["check"]["checked"] == 2
    assert code_of(checks(out, FAULTY, GOES_ON="1")) == 1
    part = read(out)["parts"]["check"]
    wrong = {name.rpartition("::")[2]: problems for name, problems in part["wrong"].items()}
    assert part["checked"] == 3
    assert wrong == {
        "test_b": ["RuntimeError: CUDA error: an illegal memory access was encountered"],
        "test_c": ["AssertionError: another reason"],
    }
    assert code_of(checks(out, FAULTY, GOES_ON="1")) == 1, "nothing is left to do, and some of it was wrong"


def test_checks_that_have_no_time_left_do_not_run(tmp_path: Path) -> None:
    assert code_of(checks(tmp_path / "out.json", FAULTY, DEADLINE=str(time.time()))) == 0
    part = read(tmp_path / "out.json")["parts"]["check"]
    assert part["left_out"].endswith("test_some.py::test_a on") and "checked" not in part


def test_the_script_starts_a_part_again_that_asks_for_it(tmp_path: Path) -> None:
    running = script(tmp_path / "out.json", PYTHON=stand_in(tmp_path, f'*ops) test -n "$GOES_ON" || exit {AGAIN} ;;'))
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 0, printed
    assert read(tmp_path / "out.json")["parts"]["ops"]["status"] == "ok"
    assert printed.count("==> ops, ") == 2


def test_the_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    update(out, "ops", {"rows": [1]})

    def dies(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", dies)
    with pytest.raises(KeyboardInterrupt):
        update(out, "ops", {"rows": [1, 2]})
    assert read(out)["parts"]["ops"]["rows"] == [1]


def test_the_driver_is_asked_about_the_gpu_that_torch_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$1, 1 MHz, 2 MHz, 3 MHz, 4 W, 50"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answer = machine.ask_driver(SimpleNamespace(uuid="12-ab"))
    assert answer["driver_version"] == "--id=GPU-12-ab"
    assert answer["clocks.sm"] == "1 MHz"
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert "does not answer" in machine.ask_driver(SimpleNamespace(uuid="12-ab"))["driver_version"]
