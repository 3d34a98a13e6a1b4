"""The JSON file of all parts. It is written after every case, so results stay if a part ends early.

python -m bench.gpu.results FILE PART KEY=VALUE ...   (PART `run` is for facts about the whole run)
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS = (
    "build",
    "warm",
    "check",
    "ops",
    "steps",
    "check_large",
    "check_tuned",
    "ops_tuned",
    "memcheck",
    "racecheck",
)
"""The most important parts first: the last ones are skipped if time is short."""
AGAIN = 75
"""Exit status of a part that needs a new process to continue."""


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    return {"run": {}, "machine": {}, "parts": {name: {"status": "not run"} for name in PARTS}}


def write(path: Path, content: dict[str, Any], indent: int | None = None) -> None:
    """Replace the file atomically, so that readers never see an unfinished file."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=indent) + "\n")
    os.replace(unfinished, path)


def update(path: Path, part: str, facts: dict[str, Any]) -> None:
    """Add facts about a part."""
    content = read(path)
    (content["parts"] if part in PARTS else content).setdefault(part, {}).update(facts)
    write(path, content)


def seconds_left() -> float:
    """Return the seconds until the part has to end, as given by bench/gpu.sh."""
    return float(os.environ.get("DEADLINE", "inf")) - time.time()


def reason(error: BaseException) -> str:
    """Return an error's type and first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def lost_the_gpu(problem: str) -> bool:
    """Whether an error left its whole process without a GPU, as a fault of a kernel does."""
    return "CUDA error" in problem or "Triton Error [CUDA]" in problem


def go_on_after(problem: str) -> None:
    """The rest is for another process, if this one has lost the GPU."""
    if lost_the_gpu(problem):
        sys.exit(AGAIN)


def so_far(path: Path, part: str) -> dict[str, Any]:
    """Return the results of an earlier process of this part, if this process continues it."""
    return read(path)["parts"][part] if os.environ.get("GOES_ON") else {}


@contextmanager
def recording(path: Path, part: str) -> Iterator[None]:
    """What stops a part is written down with what it measured."""
    try:
        yield
    except Exception as error:
        update(path, part, {"error": reason(error)})
        raise


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> None:
    path, part, *pairs = sys.argv[1:]
    update(Path(path), part, {key: _value(text) for key, _, text in (pair.partition("=") for pair in pairs)})


if __name__ == "__main__":
    main()
