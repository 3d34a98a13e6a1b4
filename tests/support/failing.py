"""Hooks that fail: with an error, or as Ctrl-C does."""

from __future__ import annotations

import signal
from typing import Any


class Boom(Exception):
    pass


def boom(*_: Any) -> None:
    raise Boom


def interrupt(*_: Any) -> None:
    """Ctrl-C; also where the tests were started with SIGINT ignored: by nohup, or in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)  # it calls Python's handler before it returns
    finally:
        signal.signal(signal.SIGINT, before)
