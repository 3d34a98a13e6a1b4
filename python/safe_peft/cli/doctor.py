"""`safe-peft doctor`: installed versions, the extension, the kernels of each device, and fixes for problems."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUILD = "pip install --no-build-isolation -e ."
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")
_TIMEOUT_S = 300  # the first import of torch from disk is slow


class Check(NamedTuple):
    """One line of the diagnosis; a problem has a fix, and is fatal if nothing works before it is fixed."""

    name: str
    found: str
    fix: str = ""
    fatal: bool = False


def diagnose() -> Iterator[Check]:
    """Check this environment, without building or downloading. A broken package does not raise an error."""
    yield Check("Python", f"{platform.python_version()} ({sys.executable})")
    yield from map(_version, _PACKAGES)
    if error := _import_error("torch"):
        yield Check("import torch", error, "pip install --force-reinstall torch", fatal=True)
        return
    yield from _machine()
    if error := _extension_error():
        yield Check("safe_kernels._C", error, BUILD, fatal=True)
        return
    yield _extension()
    yield from (Check(f"kernels on {device}", _kernels(key)) for device, key in (("CPUs", "CPU"), ("GPUs", "CUDA")))
    yield from _triton()


def _version(package: str) -> Check:
    from packaging.specifiers import SpecifierSet

    needed = _requirements().get(package, "")
    fix = f"pip install '{package}{needed}'"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Check(package, "missing", fix, fatal=True)
    if not SpecifierSet(needed).contains(version, prereleases=True):
        return Check(package, f"{version}, but {needed} is needed", fix, fatal=True)
    return Check(package, version)


def _requirements() -> dict[str, str]:
    """The versions that our metadata requires; empty if the package runs from a folder without metadata."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("safe-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}


def _import_error(module: str) -> str:
    """Import in a separate process, since a broken build may crash the process that loads it."""
    # Without -P, Python would import a folder of the same name in the working directory.
    command = [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S} s"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return f"importing it ended the process with status {done.returncode}. {last}" if done.returncode else ""


def _extension_error() -> str:
    spec = importlib.util.find_spec("safe_kernels")
    if spec is None or spec.origin is None:
        return "safe_kernels is missing"
    folder = Path(spec.origin).parent
    return _import_error("safe_kernels") if any(folder.glob("_C.*")) else f"not built: there is none in {folder}"


def _extension() -> Check:
    import torch

    from safe_kernels import _C

    found = f"{_C.__file__}, built for torch {_C.torch_version} with compiler {_C.compiler}"
    fits = _C.torch_version == torch.__version__.split("+")[0]
    return Check("safe_kernels._C", found, "" if fits else BUILD, fatal=not fits)


def _machine() -> Iterator[Check]:
    import torch

    yield Check("CPU", f"{os.cpu_count()} cores, of which torch uses {torch.get_num_threads()}")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for gpu in gpus:
        yield Check("GPU", f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB)")
    if not gpus and shutil.which("nvidia-smi"):
        yield Check("GPU", "present, but this torch cannot use it", f"install a torch for this GPU, then: {BUILD}")


def _kernels(key: str) -> str:
    """The kernels of the ops under a dispatch key, from the dispatcher's table."""
    import torch

    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("safe_kernels::")}
    served: dict[str, list[str]] = {}
    for op in sorted(name for name in names if not name.endswith("_backward")):
        table = torch._C._dispatch_dump_table(op)
        match = re.search(rf"^{key}: registered at (\S+)/\S+:\d+ .*\[kernel\]$", table, re.MULTILINE)
        source = match[1].removeprefix("/") if match else "the reference in PyTorch"
        served.setdefault(source, []).append(op.removeprefix("safe_kernels::"))
    return "; ".join(f"{source}: {', '.join(ops)}" for source, ops in served.items())


def _triton() -> Iterator[Check]:
    """Check that the kernels for GPUs can be compiled; without a GPU this is not a problem."""
    import torch

    fix = "pip install triton (Linux; the version that torch requires)"
    if importlib.util.find_spec("triton") is None:
        found = "not installed; the reference serves GPUs"
        yield Check("Triton", found, fix if torch.cuda.device_count() else "")
    elif error := _import_error("triton"):
        yield Check("Triton", error, fix)
    else:
        from safe_kernels.triton.runtime import tuning

        yield Check("Triton", f"{importlib.metadata.version('triton')} compiles the kernels for GPUs")
        try:
            choices = [f"{count} choices for {device}" for device, count in tuning.remembered().items()]
        except ValueError as error:
            yield Check("autotune", str(error), "set SAFE_KERNELS_CACHE to a folder")
        else:
            yield Check("autotune", ", ".join(choices) or "nothing measured; tiles come from a table")
        yield from _replay()


def _replay() -> Iterator[Check]:
    """Call an op on each NVIDIA GPU, and check that C++ can repeat its launches."""
    import torch

    from safe_kernels import _C
    from safe_kernels.triton.runtime.launch_replay import OBSTACLES, SWITCH

    if os.environ.get(SWITCH) == "0":
        yield Check("launch replay", f"switched off by {SWITCH}=0")
    elif torch.cuda.device_count() and not torch.version.hip and sys.platform == "linux":
        try:
            torch.ops.safe_kernels.dropout(torch.ones(16, device="cuda"), 0.5, torch.ones(2, device="cuda").long())
        except Exception as error:
            yield Check("launch replay", f"a kernel fails: {error}", "run the failing op alone with TRITON_DEBUG=1")
            return
        found = "; ".join(OBSTACLES)
        fix = "pip install the triton that this torch requires, and unset TRITON_STORE_BINARY_ONLY"
        yield Check("launch replay", found or f"{_C.record_counts()['dropout']} calls recorded", fix if found else "")


def main() -> int:
    """Print the diagnosis, and return 1 if nothing works before a problem is fixed, otherwise 0.

    `python -m safe_peft.cli.doctor` works even if the command line does not.
    """
    fatal = False
    for check in diagnose():
        print(f"{'!!' if check.fix else 'ok'} {check.name:16} {check.found}", flush=True)
        if check.fix:
            print(f"{'':19} -> {check.fix}")
        fatal |= check.fatal
    return int(fatal)


if __name__ == "__main__":
    raise SystemExit(main())
