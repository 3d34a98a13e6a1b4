"""Finds the last complete checkpoint: a process that is killed during a save leaves an incomplete one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import StateError
from . import jsonio

logger = logging.getLogger(__name__)

STATE_FILE = "safe_state.json"
TRAINER_STATE_FILE = "trainer_state.json"
PROCESSES = "processes"
"""Key in the Trainer's state for the number of processes that write a checkpoint, set by `SafeCallback`."""

INDEX = ".metadata"
"""The index file of torch.distributed.checkpoint."""
ARCHIVES = (".bin", ".pt", ".pth")


def checkpoint_files(folder: Path) -> list[Path]:
    """List the files that make a checkpoint complete: all except our own, texts for readers, and hidden files.

    A file system, a desktop or a killed save may have left a hidden file.
    """
    parts = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".md"]
    hidden = {p for p in parts if any(n.startswith(".") and n != INDEX for n in p.relative_to(folder).parts)}
    return [path for path in parts if path != folder / STATE_FILE and path not in hidden]


def fingerprints(folder: Path, files: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Flush files in a folder to the disk, and return their SHA-256 by their names relative to the folder."""
    if not isinstance(files, Iterable) or isinstance(files, str | bytes):
        raise StateError(f"files: expected paths, got {files!r}.")
    try:
        files = [jsonio.path_of(path, "files") for path in files]
        inside = [(Path(os.path.abspath(path)).relative_to(os.path.abspath(folder)), path) for path in files]
        return {name.as_posix(): _sha256(Path(path), sync=True) for name, path in inside}
    except (OSError, ValueError) as error:
        raise StateError(f"files: {error}; name existing files in {folder} or below it.") from error


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Find the newest complete checkpoint, among folders named `checkpoint-<step>`.

    A checkpoint of `SafeCallback` or of `AdapterFreezer.save` is complete if every listed file has its checksum. One
    without `safe_state.json` is complete if `trainer_state.json` exists, which a Trainer writes last, and no file is
    truncated. An incomplete checkpoint is skipped with a warning. Nothing is deleted or changed, so several processes
    may call this at the same time.

    Args:
        output_dir: the folder of checkpoints; it need not exist yet.

    Returns:
        The checkpoint's path, for `Trainer.train(resume_from_checkpoint=...)`; None if there is none.

    Raises:
        StateError: `output_dir` is not a path.

    Example:
        >>> trainer.train(resume_from_checkpoint=safe_peft.last_checkpoint("runs/mine"))  # doctest: +SKIP
    """
    for step, folder in sorted(_folders(jsonio.path_of(output_dir, "output_dir")), reverse=True):
        flaw = _flaw(folder, step)
        if flaw is None:
            return str(folder)
        logger.warning("%s is skipped, since it is not complete: %s", folder, flaw)
    return None


def _folders(output_dir: Path) -> Iterator[tuple[int, Path]]:
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if (match := re.fullmatch(r"checkpoint-([0-9]{1,18})", path.name)) and path.is_dir():
            yield int(match[1]), path


def _flaw(folder: Path, step: int) -> str | None:
    """The reason why a checkpoint is not complete; None if it is."""
    try:
        if (folder / STATE_FILE).exists():
            return _flaw_against(jsonio.read_json(folder / STATE_FILE), folder)
        return _flaw_unsigned(folder, step)
    except (OSError, StateError) as error:  # another process may be deleting it
        return str(error)


def _flaw_against(state: Any, folder: Path) -> str | None:
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        return f"{STATE_FILE} does not list its files"
    for name, sha256 in state["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != sha256:
            return f"{name} has changed since it was written"
    return None


def _flaw_unsigned(folder: Path, step: int) -> str | None:
    """A Trainer writes its state last; a file may still be truncated if the machine failed before it was flushed."""
    from safetensors import SafetensorError, safe_open

    try:  # a Trainer writes NaN, which is not strict JSON
        trainer_state = json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"{TRAINER_STATE_FILE} is not JSON ({error})"
    if not isinstance(trainer_state, dict) or trainer_state.get("global_step") != step:
        return f"{TRAINER_STATE_FILE} is not of step {step}"
    processes = _processes(trainer_state.get("stateful_callbacks"))
    for name in (f"rng_state_{index}.pth" for index in range(processes) if processes > 1):  # each process's last file
        if not (folder / name).is_file():
            return f"{name} is missing: not all {processes} processes wrote their part"
    for path in checkpoint_files(folder):
        if path.suffix in ARCHIVES and not zipfile.is_zipfile(path):
            return f"{path.name} is truncated"
        if path.suffix == ".safetensors":
            try:
                safe_open(path, framework="np").keys()
            except SafetensorError as error:
                return f"{path.name}: {error}"
    return None


def _processes(callbacks: Any) -> int:
    """The number of processes, if `SafeCallback` was among a Trainer's callbacks."""
    entries = callbacks.values() if isinstance(callbacks, dict) else ()
    attributes = [entry.get("attributes") for entry in entries if isinstance(entry, dict)]
    counts = [known.get(PROCESSES) for known in attributes if isinstance(known, dict)]
    return max((number for number in counts if isinstance(number, int)), default=1)


def _sha256(path: Path, sync: bool = False) -> str:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        if sync:
            os.fsync(stream.fileno())
    return digest.hexdigest()
