"""Dataclasses to JSON files and back: written atomically, and type-checked when read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import StateError

_FIX = "the file is damaged or of another version; write it again, or use an older file."


def encode(value: Any) -> Any:
    """Turn dataclasses, tuples and floats into JSON values; a float that is not finite becomes null.

    Example:
        >>> encode((1.0, float("nan")))
        [1.0, None]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Read a JSON value as the annotated type `kind`; `where` is its place, for errors.

    A kind is a dataclass, `int`, `float`, `str`, `bool`, `Any`, `dict[str, X]`, `list[X]`, `tuple[X, ...]`,
    `tuple[X, Y]`, or one of them or None. A null for a `float` is read as NaN.

    Example:
        >>> decode(tuple[int, ...], [1, 2], "steps")
        (1, 2)
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else decode(args[0], value, where)
    if kind is Any:
        return value
    if kind is float and (value is None or type(value) is int):
        return math.nan if value is None else float(value)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: decode(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        kinds = args if origin is tuple and args[-1] is not Ellipsis else args[:1] * len(value)
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return origin(decode(one, item, f"{where}[{index}]") for index, (one, item) in pairs)
    if type(value) is kind:
        return value
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    raise StateError(f"{where}: expected {name}, got {value!r:.60}; {_FIX}")


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    needed = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    lacks, unknown = sorted(needed - value.keys()), sorted(value.keys() - hints.keys())
    if lacks or unknown:
        wrong = f"lacks {', '.join(lacks)}" if lacks else f"has {', '.join(unknown)}, which is unknown"
        raise StateError(f"{where} {wrong}; {_FIX}")
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file."""
    path = path_of(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StateError(f"{path} does not exist.") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise StateError(f"{path} is not JSON ({error}); it is damaged or not a file of safe_peft.") from error


def path_of(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Return a user's argument as a path; `argument` is its name, for errors."""
    try:
        return Path(path)
    except TypeError:
        raise StateError(f"{argument}: expected a path, got {path!r}.") from None


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file next to its final place, and move it there only when it is complete and on the disk."""
    path = path_of(path)
    partial = path.parent / f".{path.stem}-{uuid4().hex[:12]}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise StateError(
            f"{path} cannot be written: {error.strerror or error}. The existing file is unchanged; free disk space, or "
            "choose another place."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Flush a folder, because a rename is on the disk only then. Some file systems cannot; the file is complete."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write anything that `encode` takes into a JSON file, atomically."""
    text = json.dumps(encode(value), indent=1, allow_nan=False)
    replace_file(path, f"{text}\n".encode())
