"""The doctor must answer, however broken the installation is: that is when it is asked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import safe_kernels._C
from safe_kernels.triton.runtime import launch_replay
from safe_peft.cli import doctor
from safe_peft.cli.doctor import BUILD, Check

PACKAGES = Path(doctor.__file__).parents[2]
GPU = SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=80 * 2**30)


def named(name: str) -> Check:
    (check,) = [check for check in doctor.diagnose() if check.name == name]
    return check


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: GPU)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why modules cannot be imported, by name; the others can."""
    errors: dict[str, str] = {}
    monkeypatch.setattr(doctor, "_import_error", lambda module: errors.get(module, ""))
    return errors


def test_this_environment_is_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("!!")]
    cpu, gpus = [line for line in lines if "kernels on" in line]
    assert (
        "csrc/cpu: activation, bottleneck, dora, dropout, gated_activation, layer_norm, lora, lora_linear, rms_norm"
        in cpu
    )
    assert (
        "csrc/launch_replay: activation, bottleneck, dora, dropout, gated_activation, layer_norm, lora, lora_linear"
        in gpus
    )


def test_one_process_has_one_openmp_runtime() -> None:
    """Two of them are two thread pools that fight for the cores."""
    maps = "open('/proc/self/maps').read()"
    code = f"import re, safe_kernels; print(len(set(re.findall(r'\\S*/lib(?:gomp|iomp5|omp)[-.]\\S*', {maps}))))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize(
    ("module", "error", "name", "fix"),
    [
        ("torch", "libc10.so: cannot open", "import torch", "pip install"),
        ("safe_kernels", "undefined symbol: _ZN3c10", "safe_kernels._C", BUILD),
    ],
)
def test_what_nothing_works_without(
    broken: dict[str, str], capsys: pytest.CaptureFixture[str], module: str, error: str, name: str, fix: str
) -> None:
    broken[module] = error
    assert named(name).found == error
    assert doctor.main() == 1
    assert f"-> {fix}" in capsys.readouterr().out


def test_an_extension_for_another_torch_is_a_problem(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    check = named("safe_kernels._C")
    assert (check.fix, check.fatal) == (BUILD, True)


def test_a_missing_triton_matters_only_to_a_gpu(
    broken: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert named("Triton") == Check("Triton", "not installed; the reference serves GPUs")
    request.getfixturevalue("gpu")
    check = named("Triton")
    assert "pip install triton" in check.fix and not check.fatal, "the reference serves"
    assert named("GPU").found == "a GPU (sm_90, 80 GiB)"


def test_a_triton_that_cannot_be_imported_is_a_problem(broken: dict[str, str]) -> None:
    pytest.importorskip("triton")
    assert named("Triton").found.endswith("compiles the kernels for GPUs")
    broken["triton"] = "libtriton.so: cannot open"
    check = named("Triton")
    assert check.found == "libtriton.so: cannot open" and check.fix and not check.fatal
    assert "autotune" not in {check.name for check in doctor.diagnose()}, "there is nothing to tune"


def test_a_gpu_that_this_torch_cannot_use_is_a_problem(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "this torch cannot use it" in named("GPU").found and BUILD in named("GPU").fix


def test_tuning_is_counted_where_it_is_kept(broken: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from safe_kernels.triton.runtime import tuning, tuning_store

    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path))
    assert named("autotune").found == "nothing measured; tiles come from a table"
    for device, choices in (("cuda-80-108", 1), ("cuda-90-132", 2)):
        for number in range(choices):
            tuning_store.Store(*tuning._place(tmp_path, device)).add(f"key {number}", "64x64")
    assert named("autotune").found == "1 choices for cuda-80-108, 2 choices for cuda-90-132"
    monkeypatch.setenv("SAFE_KERNELS_CACHE", str(tmp_path / "autotune-cuda-90-132.json"))
    assert "SAFE_KERNELS_CACHE" in named("autotune").fix, "no folder"


def test_the_replay_of_launches_is_tried_on_a_gpu(
    broken: object, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("SAFE_KERNELS_REPLAY", "0")
    assert named("launch replay") == Check("launch replay", "switched off by SAFE_KERNELS_REPLAY=0")
    monkeypatch.delenv("SAFE_KERNELS_REPLAY")
    assert "launch replay" not in {check.name for check in doctor.diagnose()}, "there is no GPU"
    request.getfixturevalue("gpu")
    monkeypatch.setattr(torch.version, "hip", None)
    assert named("launch replay").found.startswith("a kernel fails: "), "there is none in this machine"
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))
    assert named("launch replay") == Check("launch replay", "0 calls recorded")
    monkeypatch.setitem(launch_replay.OBSTACLES, "no PTX", 1)
    check = named("launch replay")
    assert check.found == "no PTX" and "TRITON_STORE_BINARY_ONLY" in check.fix and not check.fatal


def test_without_triton_the_reference_serves_gpus(tmp_path: Path) -> None:
    """A finder that hides Triton: importing works, and the dispatcher falls back to the reference."""
    hide = (
        "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else f(n)"
    )
    ask = "import safe_kernels; from safe_peft.cli.doctor import _kernels; print(_kernels('CUDA'))"
    done = subprocess.run([sys.executable, "-c", f"{hide}\n{ask}"], capture_output=True, text=True, check=True)
    reference, others = done.stdout.split("; ")
    assert reference.startswith("the reference in PyTorch: activation, bottleneck, dora, dropout")
    assert others == "csrc/aten: linear_cross_entropy, lora_conv\n", "PyTorch's own ops need no Triton"


def test_a_package_too_old_or_missing_is_named_with_what_is_needed(
    broken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: {"peft": ">=999"})
    assert ">=999" in named("peft").found
    assert named("peft").fix == "pip install 'peft>=999'" and doctor.main() == 1
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    assert named("no-such-package").found == "missing" and doctor.main() == 1


@pytest.mark.parametrize("content", [None, b"this is no shared library"])
def test_without_a_usable_extension_the_doctor_still_answers(tmp_path: Path, content: bytes | None) -> None:
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(PACKAGES / "safe_peft", tmp_path / "safe_peft", ignore=ignore)
    shutil.copytree(Path(safe_kernels.__file__).parent, tmp_path / "safe_kernels", ignore=ignore)
    if content is not None:
        (tmp_path / "safe_kernels" / Path(safe_kernels._C.__file__).name).write_bytes(content)
    command = [sys.executable, "-m", "safe_peft.cli.doctor"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert ("not built" if content is None else "/safe_kernels/_C.") in done.stdout
    assert BUILD in done.stdout


def test_a_crash_of_the_importing_process_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    assert "-6" in doctor._import_error("crashing")
