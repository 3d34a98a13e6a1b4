"""Looks at torch and the extension from a process of its own: a broken build may crash the process that loads it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

_DEVICES = {"CPU": "cpu", "CUDA": "cuda", "Meta": "meta"}  # dispatch key -> torch's name of the device
_COMMAND = "from safe_peft.cli.inspection import main; main()"
_TIMEOUT = 300  # seconds; the first import of torch from a cold disk is slow


@dataclass
class Findings:
    """What the inspecting process found; an error stands for everything after it."""

    torch: str = ""
    torch_error: str = ""
    extension_file: str = ""
    extension_torch: str = ""
    extension_compiler: str = ""
    extension_error: str = ""
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)  # op -> device -> kernel
    triton: str = ""  # its version; empty where it is not installed
    triton_error: str = ""
    tuning: dict[str, int] = field(default_factory=dict)  # kind of device -> choices that autotune remembers
    threads: int = 0
    gpus: list[str] = field(default_factory=list)
    openmp: list[str] = field(default_factory=list)


def inspect_in_process() -> Findings:
    """Start a process that inspects, and read what it found.

    Returns:
        The findings; a crash of that process is one of them.

    Example:
        >>> inspect_in_process().torch_error
        ''
    """
    # Without -P the working directory would come first, and a folder of the same name there be taken for the package.
    command = [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {sys.path!r}; {_COMMAND}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        return Findings(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Findings(torch_error=f"no answer within {_TIMEOUT} s")
    except (IndexError, ValueError):
        last = (done.stderr.splitlines() or [""])[-1]
        return Findings(extension_error=f"loading it ended the process with status {done.returncode} {last}".strip())


def main() -> None:
    """Inspect, and print the findings as the last line, which no import's chatter can follow."""
    print(json.dumps(dataclasses.asdict(_inspect())))


def _inspect() -> Findings:
    findings = Findings()
    try:
        import torch
    except Exception as error:
        findings.torch_error = _sentence(error)
        return findings
    findings.torch, findings.threads = torch.__version__, torch.get_num_threads()
    findings.gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    spec = importlib.util.find_spec("safe_kernels")
    package = Path(spec.origin).parent if spec and spec.origin else None
    if package is None or not list(package.glob("_C.*")):
        findings.extension_error = f"not built: there is none in {package}" if package else "safe_kernels is missing"
        return findings
    try:
        from safe_kernels import _C
    except Exception as error:
        findings.extension_error = _sentence(error.__cause__ or error)
        return findings
    findings.extension_file = str(_C.__file__)
    findings.extension_torch, findings.extension_compiler = _C.torch_version, _C.compiler
    findings.kernels = {op: _kernels(op, package) for op in _ops()}
    findings.triton, findings.triton_error = _triton()
    findings.tuning = _tuning() if findings.triton else {}
    findings.openmp = _openmp()
    return findings


def _triton() -> tuple[str, str]:
    """Triton's version, and why it cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        return "", ""
    try:
        import triton
    except Exception as error:
        return "", _sentence(error)
    return str(triton.__version__), ""


def _tuning() -> dict[str, int]:
    from safe_kernels.triton.runtime import tuning

    try:
        return tuning.remembered()
    except ValueError:  # no folder to remember in, which the cache's own check tells
        return {}


def _sentence(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB)"


def _ops() -> list[str]:
    import torch

    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split(".")[0] for name in names if name.startswith("safe_kernels::")})


def _kernels(op: str, package: Path) -> dict[str, str]:
    """Device -> kernel, read from the dispatcher's own table of what it would call."""
    import torch

    kernels = {}
    for line in torch._C._dispatch_dump_table(op).splitlines():
        match = re.match(r"(\w+): registered at (.+?):\d+ .*\[(.+)\]", line)
        if match and match[1] in _DEVICES:
            source = match[2].removeprefix(f"{package.parent}/")
            default = match[3] != "kernel"
            kernels[_DEVICES[match[1]]] = "the reference, in PyTorch's operations" if default else source
    return kernels


def _openmp() -> list[str]:
    """The OpenMP runtimes mapped into this process; two of them mean two thread pools that fight for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[-.]\S*", maps)))
