"""Measured choices, kept in a file that processes share."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_TIMEOUT_S = 10.0
"""Seconds that a process waits for another process to write. After that its choice is not stored."""
MOST_BYTES = 2**20
"""A larger file is not read: this code never writes one."""


class Store:
    """The choice for each key: in memory, and in a JSON file.

    A choice in memory does not change while the process lives, even if other processes write another one. The whole
    file is replaced, under a lock, by its content and this process's choices. A damaged or foreign file, or one with
    another `header` (the versions and code on which the choices depend), counts as absent.
    """

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        self.path = path
        self.header = dict(header)
        self.choices = self._read()

    def add(self, key: str, choice: str) -> str:
        """Remembers a choice, unless the key already has one. Returns the choice that is remembered."""
        kept = self.choices.setdefault(key, choice)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
                self._write({**self._read(), **self.choices})
        except (OSError, Timeout) as error:
            self._warn(f"cannot be written ({error}), so other processes measure again")
        return kept

    def _read(self) -> dict[str, str]:
        try:
            if self.path.stat().st_size > MOST_BYTES:
                raise ValueError("it is too large")
            content = json.loads(self.path.read_bytes())
            choices = content["choices"]
            if not all(isinstance(choice, str) for choice in choices.values()):
                raise ValueError("a choice is not a string")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            self._warn(f"cannot be read ({type(error).__name__}: {error}) and counts as empty; it may be deleted")
            return {}
        return dict(choices) if content.get("header") == self.header else {}

    def _write(self, choices: Mapping[str, str]) -> None:
        text = json.dumps({"header": self.header, "choices": dict(sorted(choices.items()))}, indent=1)
        partial = self.path.with_suffix(".partial")  # only the lock's holder writes it; a rest is overwritten
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def _warn(self, problem: str) -> None:
        if self.path not in _WARNED:
            _WARNED.add(self.path)
            warnings.warn(f"safe_kernels.autotune: {self.path} {problem}", RuntimeWarning, stacklevel=3)


_WARNED: set[Path] = set()
