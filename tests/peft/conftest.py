"""Tests of the policy run on one thread, offline, with a seed, and leave torch's settings as they found them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import safe_kernels


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every call that reached the fast path."""
    calls: list[tuple[Any, ...]] = []

    def record(name: str) -> None:
        real = getattr(safe_kernels, name)

        def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(args)
            return real(*args, **kwargs)

        monkeypatch.setattr(safe_kernels, name, recorded)

    record("lora")
    record("lora_linear")
    return calls
