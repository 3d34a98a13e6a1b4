"""The files of finished runs, one JSON each, and the statistics of several seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(value), encoding="utf-8")
    unfinished.replace(path)


def missing(part: str, seeds: Sequence[int], arms: Iterable[str], folder: Path) -> Iterator[tuple[int, str, Path]]:
    """Yield the seeds and arms of a part that have no file yet, with the paths of these files."""
    for seed in seeds:
        for arm in arms:
            path = folder / f"{part}-{seed}-{arm.replace(' ', '-')}.json"
            if not path.exists():
                yield seed, arm, path


def finished(part: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the results of a part."""
    for path in sorted(folder.glob(f"{part}-*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return stdev(values) / len(values) ** 0.5


def mean(values: Sequence[float], form: str) -> str:
    """Return a mean as text, and its standard error if there are several values."""
    error = f" ± {standard_error(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{error}"
