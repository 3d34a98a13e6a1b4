"""Collects what every compiled kernel asks of its GPU, and prints it as a table at the end."""

from __future__ import annotations

import os

import pytest

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: nothing is compiled in the interpreter"

ROWS = pytest.StashKey[list[tuple[str, ...]]]()
HEAD = ("kernel", "for", "target", "warps", "registers", "shared KiB", "tensor memory", "spilled", "tensor cores")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def table(request: pytest.FixtureRequest) -> list[tuple[str, ...]]:
    return request.config.stash[ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = [HEAD, *sorted(set(config.stash[ROWS]))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    terminalreporter.section("compiled kernels")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
