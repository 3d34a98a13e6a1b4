"""Runs the Triton kernels in Triton's interpreter, on CPU tensors, in place of the CPU kernels.

The ops are called as everywhere, through autograd; below it the host functions of safe_kernels/triton serve the CPU
(which PyTorch warns of, since they take the place of C++), with tiles so small that a little matrix has many of them
and ragged ends on all sides.
"""

from __future__ import annotations

import os

import pytest
import shim_memory
import shim_numbers
import shim_speed
import small_tiles
import torch

from safe_kernels import triton

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts: make kernels does"
shim_numbers.install()
shim_memory.install()
shim_speed.install()


for _op in (op for ops in triton.STEMS.values() for op in ops):
    triton.register_replayed(_op, "CPU")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles.use(monkeypatch)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def launches() -> list[str]:
    """The kernels launched since the test began."""
    shim_memory.launches.clear()
    return shim_memory.launches
