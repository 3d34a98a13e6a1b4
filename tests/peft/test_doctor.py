"""The doctor must answer whatever is broken: that is when it is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from safe_peft.cli import doctor, inspection
from safe_peft.cli.doctor import Check, Diagnosis
from safe_peft.cli.inspection import Findings

PACKAGES = Path(doctor.__file__).parents[2]


def healthy() -> Findings:
    return Findings(
        torch="2.13.0+cpu",
        extension_file="safe_kernels/_C.so",
        extension_torch="2.13.0",
        extension_compiler="12.2.0",
        kernels={"safe_kernels::lora": {"cpu": "csrc/cpu/lora.cpp"}},
        threads=2,
        openmp=["libgomp.so.1"],
    )


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Diagnosis]:
    """Diagnose with some findings changed, and the cache in an empty folder."""
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path / "cache"))

    def diagnose(**changes: object) -> Diagnosis:
        findings = healthy()
        for name, value in changes.items():
            setattr(findings, name, value)
        monkeypatch.setattr(doctor, "inspect_in_process", lambda: findings)
        return doctor.diagnose()

    return diagnose


def named(diagnosis: Diagnosis, name: str) -> Check:
    (check,) = [check for check in diagnosis.checks if check.name == name]
    return check


def test_this_environment_is_healthy() -> None:
    diagnosis = doctor.diagnose()
    assert diagnosis.exit_status == 0, diagnosis.problems
    assert named(diagnosis, "safe_kernels::lora on cpu").found == "csrc/cpu/lora.cpp"
    assert "reference" in named(diagnosis, "safe_kernels::lora on meta").found
    assert named(diagnosis, "safe_kernels::lora on cuda").found == "csrc/launch_replay/register_replayed.cpp"
    assert "OpenMP" not in {check.name for check in diagnosis.checks}, "one process, one OpenMP runtime"


def test_every_asset_is_listed(found: Callable[..., Diagnosis], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "minilm-0.1.0"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes(2_000_000))
    diagnosis = found()
    assert named(diagnosis, "minilm").found == "2.0 MB"
    assert named(diagnosis, "film-reviews").found == "not fetched yet"


@pytest.mark.parametrize(
    ("changes", "name", "fix"),
    [
        ({"torch_error": "libc10.so: cannot open"}, "import torch", "pip install"),
        ({"extension_error": "undefined symbol: _ZN3c10"}, "safe_kernels._C", doctor.BUILD),
        ({"extension_torch": "2.12.0"}, "built for torch", doctor.BUILD),
    ],
)
def test_what_nothing_works_without(
    found: Callable[..., Diagnosis], changes: dict[str, object], name: str, fix: str
) -> None:
    diagnosis = found(**changes)
    check = named(diagnosis, name)
    assert (check.ok, check.essential) == (False, True)
    assert fix in check.fix
    assert diagnosis.exit_status == 1
    assert f"-> {check.fix}" in str(diagnosis)


@pytest.mark.parametrize(
    ("changes", "ok", "words"),
    [
        ({"triton": "3.7.1", "gpus": ["a GPU"]}, None, "3.7.1 compiles the kernels for GPUs"),
        ({}, None, "not installed; the reference serves GPUs"),
        ({"gpus": ["a GPU"]}, False, "not installed; the reference serves GPUs"),
        ({"triton_error": "libtriton.so: cannot open"}, False, "cannot be imported: libtriton.so"),
    ],
)
def test_a_missing_triton_matters_only_to_a_gpu(
    found: Callable[..., Diagnosis], changes: dict[str, object], ok: bool | None, words: str
) -> None:
    diagnosis = found(**changes)
    check = named(diagnosis, "Triton")
    assert check.ok is ok
    assert words in check.found
    assert diagnosis.exit_status == 0, "the reference serves"


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        ({}, "nothing measured; tiles come from a table"),
        ({"cuda-90-132": 12, "cuda-80-108": 3}, "12 choices for cuda-90-132, 3 choices for cuda-80-108"),
    ],
)
def test_it_tells_what_tuning_has_found(found: Callable[..., Diagnosis], tuning: dict[str, int], words: str) -> None:
    assert named(found(triton="3.7.1", tuning=tuning), "autotune").found == words
    assert "autotune" not in {check.name for check in found(tuning=tuning).checks}, "there is nothing to tune"


def test_tuning_is_counted_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from safe_kernels.triton.runtime import tuning, tuning_store

    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path))
    tuning_store.Store(*tuning._place(tmp_path, "cuda-90-132")).add("key", "64x64")
    assert inspection.inspect_in_process().tuning == {"cuda-90-132": 1}
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path / "autotune-cuda-90-132.json"))
    assert inspection.inspect_in_process().tuning == {}, "no folder: the cache's own check tells"


def test_without_triton_the_reference_serves_gpus(tmp_path: Path) -> None:
    """A finder that hides Triton: importing works, and the dispatcher falls back to the reference."""
    hide = (
        "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else f(n)"
    )
    ask = "import torch, safe_kernels; print(torch._C._dispatch_dump_table('safe_kernels::lora'))"
    done = subprocess.run([sys.executable, "-c", f"{hide}\n{ask}"], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("CUDA:")]
    assert line.endswith("[default backend kernel]")


def test_two_openmp_runtimes_are_a_problem_but_no_fatal_one(found: Callable[..., Diagnosis]) -> None:
    diagnosis = found(openmp=["libgomp.so.1", "libomp.so.5"])
    assert named(diagnosis, "OpenMP").ok is False
    assert diagnosis.exit_status == 0


def test_a_missing_compiler_matters_only_when_there_is_something_to_build(
    found: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert named(found(), "C++ compiler").ok is False
    assert found().exit_status == 0
    assert named(found(extension_error="not built"), "C++ compiler").essential


def test_a_package_too_old_is_named_with_what_is_needed(
    found: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: {"peft": ">=999"})
    diagnosis = found()
    assert ">=999" in named(diagnosis, "peft").found
    assert named(diagnosis, "peft").fix == "pip install 'peft>=999'"
    assert diagnosis.exit_status == 1


def test_a_missing_package_is_named(found: Callable[..., Diagnosis], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert named(found(), "no-such-package").found == "missing"


def copy_of_packages(folder: Path) -> Path:
    """Both packages without the extension, on a path of their own."""
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(PACKAGES / "safe_peft", folder / "safe_peft", ignore=ignore)
    import safe_kernels

    shutil.copytree(Path(safe_kernels.__file__).parent, folder / "safe_kernels", ignore=ignore)
    return folder


@pytest.mark.parametrize("content", [None, b"this is no shared library"])
def test_without_a_usable_extension_the_doctor_still_answers(tmp_path: Path, content: bytes | None) -> None:
    folder = copy_of_packages(tmp_path)
    if content is not None:
        import safe_kernels._C

        (folder / "safe_kernels" / Path(safe_kernels._C.__file__).name).write_bytes(content)
    command = [sys.executable, "-c", "from safe_peft.cli.doctor import main; raise SystemExit(main())"]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert ("not built" if content is None else "/safe_kernels/_C.") in done.stdout
    assert doctor.BUILD in done.stdout


def test_a_crash_of_the_inspecting_process_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_COMMAND", "import os; os.abort()")
    assert "-6" in inspection.inspect_in_process().extension_error


def test_chatter_of_imports_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"torch": "9.9"})
    monkeypatch.setattr(inspection, "_COMMAND", f"print('chatter'); print({answer!r})")
    assert inspection.inspect_in_process().torch == "9.9"
