"""Frozen dataclasses to JSON and back, with every value checked on the way in.

A file that was cut short, edited by hand or written by another program must not turn into a wrong number later on, so
reading is strict: names and types are those of the dataclass, or the file is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import sys
import tempfile
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import StateError

LEVELS = 64
"""How deep values may be nested that nothing describes: what was read has to be written again."""


def encode(value: Any) -> Any:
    """Turn dataclasses, tuples and floats into what JSON can hold; a float that is not finite becomes null.

    Args:
        value: a dataclass instance, or a container of JSON values and dataclass instances.

    Returns:
        The same as dicts, lists, strings, numbers, booleans and None.

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
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Read a JSON value as the annotated type `kind`.

    Args:
        kind: a dataclass, `int`, `float`, `str`, `bool`, `dict`, `dict[str, X]`, `tuple[X, ...]`,
            `tuple[X, Y]` or a union of them. A `float` that is null was not finite, and is read as NaN.
        value: what `json.loads` gave.
        where: the value's place, named in errors.

    Returns:
        An instance of `kind`.

    Raises:
        StateError: The value is not of that kind.

    Example:
        >>> decode(tuple[int, ...], [1, 2], "steps")
        (1, 2)
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is tuple:
        return _decode_tuple(args, value, where)
    if origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: decode(args[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind is Any:
        _expect(_is_shallow(value), where, f"at most {LEVELS} levels deep", value)
        return value
    if kind is float:
        return _decode_float(value, where)
    _expect(isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, f"{kind.__name__}", value)
    return value


def _is_shallow(value: Any, levels: int = LEVELS) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in items)


def _decode_float(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    _expect(isinstance(value, int | float) and not isinstance(value, bool), where, "a number", value)
    # An int beyond every float compares well, and only fails to become one.
    _expect(abs(value) <= sys.float_info.max, where, "a finite number", value)
    return float(value)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), where, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = {name for name, field in fields.items() if _has_no_default(field)}
    missing, unknown = sorted(required - value.keys()), sorted(value.keys() - fields.keys())
    if missing or unknown:
        wrong = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which nothing here writes"
        raise StateError(f"{where} {wrong}; the file is damaged or of another version, so write it again.")
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decode_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    kinds = [kind for kind in args if kind is not types.NoneType]
    for kind in kinds:
        try:
            return decode(kind, value, where)
        except StateError:
            if kind is kinds[-1]:
                raise
    raise AssertionError("a union has members")


def _decode_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), where, "a list", value)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    _expect(len(value) == len(args), where, f"a list of {len(args)}", value)
    return tuple(decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, value, strict=True)))


def _expect(holds: bool, where: str, expected: str, value: Any) -> None:
    if not holds:
        raise StateError(f"{where} must be {expected}, got {short(value)}; the file is damaged, so write it again.")


def short(value: Any) -> str:
    """Show a value that may be anything: huge ints and deep lists refuse to be printed.

    Example:
        >>> short([1, 2])
        'a list of 2'
    """
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return repr(str(value)[:60])


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Args:
        path: the file.

    Returns:
        What it holds.

    Raises:
        StateError: There is no such file, or it is not JSON, or names a value twice.

    Example:
        >>> read_json("runs/demo/report.json")  # doctest: +SKIP
    """
    text = _read_bytes(path)
    try:
        return json.loads(text.decode(), parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
    except ValueError as error:
        raise StateError(f"{path} is not JSON ({error}); it is damaged or not a file of safe_peft.") from error
    except RecursionError:
        raise StateError(f"{path} is nested too deeply; it is not a file of safe_peft.") from None


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    path = path_of(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe may have no end
            raise StateError(f"{path} is no ordinary file; point to a JSON file of safe_peft.")
        return path.read_bytes()
    except FileNotFoundError:
        raise StateError(f"{path} does not exist.") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a value twice")
    return found


def path_of(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Return what a user passed as a path.

    Args:
        path: what came.
        argument: what it is called.

    Raises:
        StateError: It is none.

    Example:
        >>> path_of("runs/demo").name
        'demo'
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(found := os.fspath(path), str) or "\0" in found:
        raise StateError(f"{argument}: expected a path, got {path!r}.")
    return Path(found)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file next to its final place and move it there only when it is complete and on the disk.

    Args:
        path: where the file shall be; its folder is made when missing.

    Yields:
        The path to write to. Whatever stops the block leaves the file that was there before, and nothing half-made.

    Raises:
        StateError: It cannot be written there.

    Example:
        >>> with replacing("notes.txt") as partial:  # doctest: +SKIP
        ...     partial.write_text("complete")
    """
    path = path_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            with partial.open("rb+") as stream:
                os.fsync(stream.fileno())
            partial.chmod(0o666 & ~_umask())
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StateError(
            f"{path} cannot be written: {error.strerror or error}. What was there before is untouched; make room, or "
            "choose another place."
        ) from error


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when the folder is. Not every file system can, and the file is complete anyway."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file atomically.

    Args:
        path: the file.
        value: anything `encode` takes.

    Raises:
        StateError: It cannot be written there; what was there before is untouched.

    Example:
        >>> write_json("state.json", {"step": 3})  # doctest: +SKIP
    """
    text = json.dumps(encode(value), indent=1, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
