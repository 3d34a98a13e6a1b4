"""Hooks that fail: with an error, or as Ctrl-C does."""

from __future__ import annotations

import signal
from typing import Any


class Boom(Exception):
    pass


def boom(*_: Any) -> None:
    raise Boom


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)
