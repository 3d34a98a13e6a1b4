"""Runs the Triton kernels in Triton's interpreter, on CPU tensors, in place of the CPU kernels.

The ops are called as everywhere, through autograd; below it the host functions of safe_kernels/triton serve the CPU
(which PyTorch warns of, since they take the place of C++), with tiles so small that a little matrix has many of them
and ragged ends on all sides.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import shim_memory
import shim_numbers
import shim_speed
import torch

from safe_kernels import triton
from safe_kernels.triton.runtime import configs

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before Python starts: make kernels does"
shim_numbers.install()
shim_memory.install()
shim_speed.install()


def small(kernel: str, entry: configs.Config) -> configs.Config:
    """No tile is larger than it must be, and three terms need no GPU's shared memory."""
    tiles = {name: 16 for name in ("block_m", "block_n", "block_k") if getattr(entry, name)}
    return replace(entry, **tiles, shared=0 if entry.terms else entry.shared)


for _op in (op for ops in triton.STEMS.values() for op in ops):
    triton.register_replayed(_op, "CPU")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TABLE", "NEIGHBOURS"):
        tables = getattr(configs, name).items()
        smaller = {kernel: tuple(small(kernel, entry) for entry in entries) for kernel, entries in tables}
        monkeypatch.setattr(configs, name, smaller)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def launches() -> list[str]:
    """The kernels launched since the test began."""
    shim_memory.launches.clear()
    return shim_memory.launches
