"""Says what is installed, which kernel serves which device, whether the extension can be built, and what to fix."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MissingPackageError, require
from .inspection import Findings, inspect_in_process

if TYPE_CHECKING:
    from rich.table import Table

BUILD = "pip install --no-build-isolation -e ."
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")  # without these nothing works
_OPTIONAL = ("triton", "gguf")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        group: the heading it belongs under.
        name: what was looked at.
        found: what was found.
        ok: False for a problem, None for a plain fact.
        essential: whether the package cannot work with this problem.
        fix: the command or step that fixes the problem.
    """

    group: str
    name: str
    found: str
    ok: bool | None = None
    essential: bool = False
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything `diagnose` looked at."""

    checks: tuple[Check, ...]

    @property
    def problems(self) -> tuple[Check, ...]:
        """What is wrong."""
        return tuple(check for check in self.checks if check.ok is False)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong that the package cannot work with."""
        return not any(check.essential for check in self.problems)

    @property
    def exit_status(self) -> int:
        """What a command that prints this should exit with."""
        return 0 if self.healthy else 1

    def __str__(self) -> str:
        from ..report.tables import as_text  # which needs no extension

        return as_text(self.table())

    def table(self) -> Table:
        """Lay everything out for the terminal.

        Returns:
            A table; each problem is followed by what fixes it.

        Example:
            >>> rich.print(diagnose().table())  # doctest: +SKIP
        """
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, pad_edge=False)
        for overflow in (
            "ellipsis",
            "ellipsis",
            "fold",
        ):  # what was found is often a path, which is of no use in part
            table.add_column(overflow=overflow)
        group = ""
        for check in self.checks:
            if check.group != group:
                group = check.group
                table.add_row(Text(f"\n{group}", style="bold"))
            mark, style = {True: ("ok", "green"), False: ("!!", "red"), None: ("", "")}[check.ok]
            found = Text(check.found)
            if check.ok is False and check.fix:
                found.append(f"\n-> {check.fix}", style="yellow")
            table.add_row(Text(f"  {check.name}"), Text(mark, style=style), found)
        return table


def diagnose() -> Diagnosis:
    """Look at this environment. Nothing is built or fetched, and nothing found here, however broken, raises.

    Returns:
        What was found; `exit_status` sums it up.

    Example:
        >>> diagnose().checks[0].name
        'Python'
    """
    findings = inspect_in_process()
    parts = (_versions(), _extension(findings), _kernels(findings), _build(findings), _machine(findings))
    return Diagnosis(tuple(check for part in parts for check in part))


def _versions() -> Iterator[Check]:
    group = "installed"
    good = sys.version_info >= (3, 11)
    yield Check(group, "Python", f"{platform.python_version()} ({sys.executable})", good, True, "use Python >= 3.11")
    wanted = _requirements()
    for name in _PACKAGES:
        version, need = _version(name), wanted.get(name, "")
        fix = f"pip install '{name}{need}'"
        if version is None:
            yield Check(group, name, "missing", False, True, fix)
        else:
            good = _satisfies(version, need)
            yield Check(group, name, version if good else f"{version}, but {need} is needed", good, True, fix)
    for name in _OPTIONAL:
        yield Check(group, name, _version(name) or "not installed (optional)")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements() -> dict[str, str]:
    """The versions our own metadata ask for; empty when the package runs from a folder that was never installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("safe-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {requirement.name: str(requirement.specifier) for requirement in map(Requirement, lines)}


def _satisfies(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _extension(findings: Findings) -> Iterator[Check]:
    group = "extension"
    if findings.torch_error:
        yield Check(group, "import torch", findings.torch_error, False, True, "pip install --force-reinstall torch")
    elif findings.extension_error:
        yield Check(group, "safe_kernels._C", findings.extension_error, False, True, BUILD)
    else:
        yield Check(group, "safe_kernels._C", findings.extension_file, True)
        built, running = findings.extension_torch, findings.torch.split("+")[0]
        yield Check(group, "built for torch", f"{built}, running {findings.torch}", built == running, True, BUILD)
        yield Check(group, "built with", findings.extension_compiler)


def _kernels(findings: Findings) -> Iterator[Check]:
    """Which kernel serves an op where, as PyTorch's dispatcher itself tells it."""
    for op, devices in findings.kernels.items():
        for device, kernel in devices.items():
            yield Check("kernels", f"{op} on {device}", kernel)
    if findings.kernels:
        yield _triton(findings)
    if findings.triton:
        found = [f"{count} choices for {device}" for device, count in findings.tuning.items()]
        yield Check("kernels", "autotune", ", ".join(found) or "nothing measured; tiles come from a table")


def _triton(findings: Findings) -> Check:
    """Whether the kernels for GPUs can be compiled: a problem only where there is a GPU to compile them for."""
    found, good = f"{findings.triton} compiles the kernels for GPUs", None
    if findings.triton_error:
        found, good = f"cannot be imported: {findings.triton_error}", False
    elif not findings.triton:
        found, good = "not installed; the reference serves GPUs", False if findings.gpus else None
    return Check("kernels", "Triton", found, good, False, "pip install triton (Linux; the version torch asks for)")


def _build(findings: Findings) -> Iterator[Check]:
    """Whether the extension can be built here. Only a matter of life and death as long as it does not load."""
    group, essential = "building the extension", bool(findings.extension_error)
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((path for name in names if (path := shutil.which(name.split()[0]))), None)
    install = "apt-get install g++ (Debian, Ubuntu), or set CXX to a C++17 compiler"
    found = _first_line([compiler, "--version"]) if compiler else f"none of {', '.join(names)} found"
    yield Check(group, "C++ compiler", found, compiler is not None, essential, install)
    ninja = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    found = _first_line([ninja, "--version"]) if ninja else "missing; the build is slower without it"
    yield Check(group, "ninja", found, ninja is not None, False, "pip install ninja")
    header = Path(sysconfig.get_path("include"), "Python.h")
    fix = "apt-get install python3-dev (Debian, Ubuntu)"
    yield Check(group, "Python headers", str(header.parent), header.exists(), essential, fix)
    setuptools = _version("setuptools")
    good = setuptools is not None and _satisfies(setuptools, ">=70")
    yield Check(group, "setuptools", setuptools or "missing", good, essential, "pip install 'setuptools>=70'")


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]} does not run: {error}"
    return f"{command[0]}: {(done.stdout.splitlines() or ['no version'])[0]}"


def _machine(findings: Findings) -> Iterator[Check]:
    group = "machine"
    yield Check(group, "CPU", f"{os.cpu_count()} cores, {findings.threads} threads used by torch, {platform.machine()}")
    if len(findings.openmp) > 1:
        found = f"{len(findings.openmp)} OpenMP runtimes in one process: {', '.join(findings.openmp)}"
        yield Check(group, "OpenMP", found, False, False, BUILD)
    unused = not findings.gpus and shutil.which("nvidia-smi") is not None
    found = ", ".join(findings.gpus) or ("present, but this torch cannot use it" if unused else "none")
    fix = f"install a build of torch for this GPU, then: {BUILD}"
    yield Check(group, "GPU", found, False if unused else None, False, fix)


def main() -> int:
    """Print the diagnosis; `python -m safe_peft.cli.doctor` works even where the command line does not.

    Returns:
        The exit status.

    Example:
        >>> main()  # doctest: +SKIP
        0
    """
    try:
        require("rich", "cli")
    except MissingPackageError as error:
        raise SystemExit(f"safe-peft doctor: {error}") from None
    from rich.console import Console

    diagnosis = diagnose()
    Console().print(diagnosis.table())
    return diagnosis.exit_status


if __name__ == "__main__":
    raise SystemExit(main())
