"""Calls functions in new processes that are forked from one that has imported what the tests import, and ran no test.

Such a process costs nothing, and a Python that imports as much eight seconds of processor time. It has no threads of
a test to lose, and what it changes is gone with it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

_context = multiprocessing.get_context("fork")
_server: list[Connection] = []


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit status; as in `subprocess`, less than zero if a signal killed it."""
    value: Any
    """What the function returned."""
    error: str
    """The traceback, or "died" or "hung"; empty if the function returned or left by `sys.exit`."""
    out: str
    err: str
    """What it printed, and what its children did."""


def start_server() -> None:
    """Fork the process from which the others will be forked; it ends with this one."""
    ours, theirs = multiprocessing.Pipe()
    if os.fork() == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    _server[:] = [ours]


def call(function: Callable[..., Any], *args: Any, seconds: float = 90) -> Ended:
    """Call a function at the top level of a module, with plain values, in a process of its own."""
    return call_each(function, [args], seconds)[0]


def call_each(function: Callable[..., Any], calls: Sequence[Sequence[Any]], seconds: float) -> list[Ended]:
    """The same with several arguments at the same time, each in a process of its own."""
    _server[0].send((function, calls, seconds))
    ended = _server[0].recv()
    if isinstance(ended, BaseException):
        raise ended
    return ended


def forget(*packages: str) -> None:
    """In such a process: as if these had not been imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def _serve(requests: Connection) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with suppress(EOFError, OSError):
            while True:
                try:
                    ended: Any = _run(*requests.recv())
                except (ImportError, AttributeError) as error:  # such a function cannot be called by its name
                    ended = error
                requests.send(ended)
    finally:
        os._exit(0)


def _run(function: Callable[..., Any], calls: Sequence[Sequence[Any]], seconds: float) -> list[Ended]:
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, args in enumerate(calls):
            reader, sender = _context.Pipe(duplex=False)
            prints = Path(folder, f"{number}.out"), Path(folder, f"{number}.err")
            process = _context.Process(target=_work, args=(sender, prints, function, args))
            process.start()
            sender.close()
            started.append((process, reader, prints))
        deadline = time.monotonic() + seconds
        received = [_receive(reader, deadline) for _, reader, _ in started]
        ended = []
        for (process, _, prints), (value, error) in zip(started, received, strict=True):
            process.join(0 if error == "hung" else 5)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it forked too
            process.join()
            assert process.exitcode is not None
            ended.append(Ended(process.exitcode, value, error, *(path.read_text(errors="replace") for path in prints)))
        return ended


def _receive(reader: Connection, deadline: float) -> tuple[Any, str]:
    try:
        if reader.poll(max(0.0, deadline - time.monotonic())):
            return reader.recv()
    except EOFError:
        return None, "died"
    return None, "hung"


def _work(sender: Connection, prints: tuple[Path, Path], function: Callable[..., Any], args: Sequence[Any]) -> None:
    os.setsid()
    gc.freeze()  # or a collection would write to, and so copy, all that was imported before the fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, number in zip(prints, (1, 2), strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    torch.manual_seed(0)
    code: Any = 0
    try:
        outcome = function(*args), ""
    except SystemExit as error:
        code, outcome = error.code, (None, "")
    except BaseException:
        code, outcome = 1, (None, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(outcome)
    sender.close()
    sys.exit(code)
