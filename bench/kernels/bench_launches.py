"""Processor time per call of the GPU ops: launches replayed from C++, compared with the same launches from Python.

No GPU is needed: Triton's launcher and ours call a driver that runs nothing (tests/triton/libcuda.c).
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from typing import Any

import pytest
import torch
from comparison import compare
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("triton")

from stub_driver import stub
from torch import Tensor

CALLS = 20
N, D, R = 64, 256, 16


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


STATE = torch.tensor([1, 2])
X, BASE, A, B = normal(N, D), normal(N, D), normal(R, D), normal(D, R)
BLOCKS = (torch.tensor([0, 32]), 32, None)
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "lora": ("lora", (X, BASE, A, B, 2.0, 0.1, STATE)),
    "lora, scored": ("lora", (X, BASE, A, B, 2.0, 0.1, STATE, *BLOCKS)),
    "lora_backward": ("lora_backward", (BASE, X, A, B, 2.0, 0.1, STATE, [True, True, True])),
    "rms_norm": ("rms_norm", (X, normal(D), 1e-6, 0.0, True)),
    "rms_norm_backward": ("rms_norm_backward", (X, BASE, normal(D), torch.rand(N), 0.0, True, [True, False])),
    "gated_activation": ("gated_activation", (X, BASE, "silu", 0.0, None)),
}


def often(call: Callable[..., Any], op: str, arguments: tuple[Any, ...]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call(op, *arguments)

    return run


@pytest.mark.benchmark(timer=process_time)
@pytest.mark.parametrize("case", CASES)
def test_launches(benchmark: BenchmarkFixture, case: str) -> None:
    driver, (op, arguments) = stub(), CASES[case]
    _, watch = driver.watched(lambda: driver.hosted(op, *arguments))
    replayed, by_python = (often(call, op, arguments) for call in (driver.dispatched, driver.hosted))
    facts = {"launches": len(watch.launches), "calls": CALLS}
    compare(benchmark, replayed, by_python, rounds=100, clock=process_time, **facts)
