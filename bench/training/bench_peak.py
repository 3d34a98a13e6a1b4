"""Peak memory of a process: SmolLM2, 4 x 512 tokens, fresh processes, ours and stock PEFT with the same loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import smollm2
from pytest_benchmark.fixture import BenchmarkFixture


def start(*options: str) -> str:
    """Run the script in a separate process, which imports from the same folders, and return its output."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, smollm2.__file__, *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@cache
def run(provider: str, p: float, frozen: str, loss: str) -> dict[str, Any]:
    """Run two steps in a separate process."""
    output = start("--provider", provider, "--p", str(p), "--frozen", frozen, "--loss", loss)
    return json.loads(output.splitlines()[-1])


CASES = [
    ("none", 0.0, "model"),
    *((frozen, 0.1, loss) for loss in ("model", "chunked") for frozen in ("none", "lower half")),
]


@pytest.mark.parametrize(("frozen", "p", "loss"), CASES)
def test_peak(benchmark: BenchmarkFixture, frozen: str, p: float, loss: str) -> None:
    stock = run("peft", p, "none", loss)
    ours = benchmark.pedantic(run, args=("safe", p, frozen, loss), rounds=1, iterations=1)
    benchmark.extra_info |= {
        "peak_rss": ours["peak_rss"],
        "stock_peak_rss": stock["peak_rss"],
        "ratio": ours["peak_rss"] / stock["peak_rss"],
    }
    if p == 0.0:
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-3)
