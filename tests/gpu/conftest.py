"""What needs a GPU (`make test-gpu`): without one every test of this folder is skipped."""

from __future__ import annotations

import os

import pytest
import torch

GPUS = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
DEVICES = os.environ.get("SAFE_KERNELS_TEST_DEVICE", "").split() or GPUS or ["cuda"]
"""Each GPU of this machine; `SAFE_KERNELS_TEST_DEVICE=cpu` goes through the tests without one, to try themselves."""


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run."""
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU; on a machine with one: make test-gpu")
    return torch.device(request.param)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same, for what a CPU has not: streams, graphs, launches."""
    if device.type == "cpu":
        pytest.skip("CUDA's own: streams, graphs, launches")
    return device


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    """All threads: the CPU computes what the GPU's results are compared with."""
    torch.manual_seed(0)
