"""Fetches assets into the cache. A folder there is complete or absent.

An asset is made in a hidden folder, which is renamed at the end, under a lock. So several processes may fetch the same
asset, and each of them may be killed. The next fetch of the asset removes what a killed process has left.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from .download import MORE_SPACE, download
from .errors import AssetError
from .table import ASSETS, Asset

_NOTE = "asset.json"


def available() -> tuple[str, ...]:
    """Return the names for `fetch`.

    Returns:
        Names, models first.

    Example:
        >>> "minilm" in available()
        True
    """
    return tuple(ASSETS)


def cache_dir() -> Path:
    """Return the folder of the cache: $SAFE_KERNELS_CACHE, or ~/.cache/safe_kernels.

    Returns:
        The folder, which need not exist yet.

    Raises:
        AssetError: The variable is not set and there is no home folder.
    """
    chosen = os.environ.get("SAFE_KERNELS_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "safe_kernels"
    except RuntimeError:
        raise AssetError("there is no home folder to keep a cache in; set SAFE_KERNELS_CACHE to a folder.") from None


def cached(name: str) -> Path | None:
    """Return the folder of an asset that was fetched before.

    Args:
        name: one of `available()`.

    Returns:
        Its folder, or None.

    Raises:
        AssetError: The name is unknown.
    """
    folder = cache_dir() / _asset(name).folder
    return folder if folder.is_dir() else None


def fetch(name: str) -> Path:
    """Return the folder of a model or a data set; it is downloaded with pip if it is not in the cache.

    Args:
        name: one of `available()`.

    Returns:
        A folder; the folder of a model can be given to `from_pretrained`.

    Raises:
        AssetError: The name is unknown, there is no network, a hash is wrong, the disk is full, or a package is
            missing. The message says how to fix it. No unfinished folder is left.
    """
    folder = cached(name)
    if folder is not None:
        return folder
    asset = _asset(name)
    asset.require()
    cache = cache_dir()
    with _explained(asset.name, cache):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{asset.name}.lock"):
            folder = cache / asset.folder
            return folder if folder.is_dir() else _make(asset, folder)


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"there is no asset {name!r}; expected one of {', '.join(ASSETS)}.")
    return ASSETS[name]


@contextmanager
def _explained(name: str, cache: Path) -> Iterator[None]:
    """Turn errors of the operating system into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise AssetError(f"{name}: the disk is full; {MORE_SPACE}") from error
        raise AssetError(
            f"{name}: the cache {cache} cannot be written ({error.strerror or error}); "
            "fix its permissions, or set SAFE_KERNELS_CACHE to another folder."
        ) from error


def _make(asset: Asset, folder: Path) -> Path:
    prefix = f".{asset.name}-partial-"
    for left in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    _check_space(asset, folder.parent)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent, ignore_cleanup_errors=True) as work:
        archives, made = Path(work, "archives"), Path(work, "made")
        archives.mkdir()
        made.mkdir()
        asset.unpack(download(asset.name, asset.archives, archives, asset.size), made)
        for path, sha256 in asset.files.items():
            _check_hash(asset.name, made / path, sha256)
        asset.finish(made)
        _note(asset, made)
        _flush(made)
        os.replace(made, folder)
    return folder


def _check_space(asset: Asset, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < asset.space:
        raise AssetError(
            f"{asset.name}: {asset.space / 1e6:.0f} MB are needed to make it, and {folder} has {free / 1e6:.0f} MB; "
            f"{MORE_SPACE}"
        )


def _check_hash(name: str, path: Path, expected: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise AssetError(
            f"{name}: {path.name} has sha256 {got}, expected {expected}, so it was deleted; try again, and if this "
            "happens again, do not use this registry or proxy."
        )


def _note(asset: Asset, folder: Path) -> None:
    """Write the origin of the files next to them, because users keep a cache for a long time."""
    note = {
        "name": asset.name,
        "about": asset.about,
        "licence": asset.licence,
        "packages": [f"{archive.package}=={archive.version}" for archive in asset.archives],
        "sha256": dict(asset.files),
    }
    (folder / _NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    """Sync the files to disk before the folder gets its name: after a power cut, a named folder must be complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
