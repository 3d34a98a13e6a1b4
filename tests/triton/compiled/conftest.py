"""Prints what every compiled kernel asks of its GPU as a table at the end."""

from __future__ import annotations

import os

import pytest

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: nothing is compiled in the interpreter"

HEAD = (
    "kernel",
    "for",
    "target",
    "warps",
    "programs",
    "registers",
    "shared KiB",
    "tensor memory",
    "spilled",
    "tensor cores",
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Reads the rows from the tests' properties, which come along from other processes, too."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    kept = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    rows = [HEAD, *sorted({tuple(row) for name, value in kept if name == "compiled" for row in value})]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    terminalreporter.section("compiled kernels")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line("  ".join(cells).rstrip())
