"""Choices that took time to make, kept in a file that processes share."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

LONGEST_WAIT = 10.0
"""Seconds that a process waits for another one's write; then it keeps its choice to itself."""
MOST_BYTES = 2**20
"""A file larger than any that was written here is not read."""


class Store:
    """What was chosen for each key: in memory, and in a JSON file.

    A choice in memory stays for as long as the process lives, whatever others write. The file is replaced whole, under
    a lock, by what it holds and what this process has added. One that is torn, foreign or made under another `header`
    counts as absent.

    Args:
        path: the file; its folder is made by the first write.
        header: what the choices depend on.

    Example:
        >>> store = Store(Path("choices.json"), {"triton": "3.7.1"})  # doctest: +SKIP
        >>> store.add("lora_apply 8192x4096x16", "64x128 warps 4 stages 3")  # doctest: +SKIP
    """

    def __init__(self, path: Path, header: Mapping[str, str]) -> None:
        self.path = path
        self.header = dict(header)
        self.choices = self._read()

    def add(self, key: str, choice: str) -> str:
        """Remembers a choice, unless one was made for this key meanwhile.

        Args:
            key: what was chosen for.
            choice: what was chosen.

        Returns:
            The choice that holds.
        """
        kept = self.choices.setdefault(key, choice)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=LONGEST_WAIT):
                self._write({**self._read(), **self.choices})
        except (OSError, Timeout) as error:
            self._warn(f"cannot be written ({error}), so other processes will measure again")
        return kept

    def _read(self) -> dict[str, str]:
        try:
            if self.path.stat().st_size > MOST_BYTES:
                raise ValueError("it is too large")
            content = json.loads(self.path.read_bytes())
            choices = content["choices"]
            if not all(isinstance(choice, str) for choice in choices.values()):
                raise ValueError("a choice is no string")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            self._warn(f"cannot be read ({type(error).__name__}: {error}) and counts as empty; it may be deleted")
            return {}
        return dict(choices) if content.get("header") == self.header else {}

    def _write(self, choices: Mapping[str, str]) -> None:
        text = json.dumps({"header": self.header, "choices": dict(sorted(choices.items()))}, indent=1)
        partial = self.path.with_suffix(".partial")  # the lock's holder alone writes it, over what a killed one left
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
