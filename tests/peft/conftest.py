"""For tests of what a bound layer calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import safe_kernels


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

    record("bottleneck")
    record("dora")
    record("lora")
    record("lora_conv")
    record("lora_linear")
    return calls
