"""A plugin of pytest: writes each outcome of the tests in tests/gpu into the JSON of bench/gpu.sh at once.

python -m pytest -p bench.gpu.checks tests/gpu --out FILE --part PART [--dry-run] [--autotune]
"""

from __future__ import annotations

from typing import Any

import pytest

import safe_kernels

from .machine import add_options, device_of
from .results import AGAIN, lost_the_gpu, seconds_left, so_far, update


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("bench/gpu.sh").addoption)


def pytest_configure(config: pytest.Config) -> None:
    device_of(config.option)
    safe_kernels.autotune(config.option.autotune)
    config.pluginmanager.register(Recorder(config.option))


class Recorder:
    """Counts the tests, keeps the reasons of failures, and stops when the time is over or the GPU is lost."""

    def __init__(self, options: Any) -> None:
        self.options = options
        before = so_far(options.out, options.part)
        self.found: dict[str, Any] = {"checked": 0, "skipped": 0, "wrong": {}} | before
        self.time_is_up = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the tests that an earlier process of this part has run."""
        del items[: self.found["checked"] + self.found["skipped"]]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Return True to skip a test, because the time is over."""
        if not self.time_is_up and seconds_left() < 3:
            self.time_is_up = True
            update(self.options.out, self.options.part, {"left_out": f"from {item.nodeid} on"})
        return self.time_is_up or None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.found["skipped" if report.skipped else "checked"] += report.when != "teardown"
        problem = _problem(report) if report.failed else ""
        if problem:
            self.found["wrong"][report.nodeid] = [problem]
        update(self.options.out, self.options.part, self.found)
        if lost_the_gpu(problem):
            pytest.exit(problem, returncode=AGAIN)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Of all processes of this part, the last of which may have had nothing left to do."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = int(bool(self.found["wrong"]))


def _problem(report: pytest.TestReport) -> str:
    """Return the first line of a test's error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).partition("\n")[0][:300]
