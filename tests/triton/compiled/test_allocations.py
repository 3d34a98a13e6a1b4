"""What backward allocates in addition to its results is a small share of what it reads, at sizes of real training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton as compiler
from compiling import TARGETS, FakeDriver, meta
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from safe_kernels import triton

ROWS = 8192
HALF, SINGLE = torch.bfloat16, torch.float32


class Allocations(TorchDispatchMode):
    """The tensors that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format):
            self.made.append(result)
        return result


@contextmanager
def without_launches(monkeypatch: pytest.MonkeyPatch, target: str) -> Iterator[None]:
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    compiler.runtime.driver.set_active(FakeDriver(TARGETS[target]))
    yield


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("d_in", "d_out"), [(14336, 4096), (4096, 4096), (576, 1536)])
@pytest.mark.parametrize("rank", [8, 40, 64])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, False, True), (False, True, False)], ids=str)
@pytest.mark.parametrize(("dtype", "adapter"), [(HALF, HALF), (HALF, SINGLE), (SINGLE, SINGLE)])
def test_sums_of_groups_of_rows_are_small(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    d_in: int,
    d_out: int,
    rank: int,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
    adapter: torch.dtype,
) -> None:
    """At most an eighth of the half-precision matrix they were summed from, or 4 MiB."""
    x, grad = meta(ROWS, d_in, dtype=dtype), meta(ROWS, d_out, dtype=dtype)
    A, B = meta(rank, d_in, dtype=adapter), meta(d_out, rank, dtype=adapter)
    with without_launches(monkeypatch, target), Allocations() as found:
        results = triton.host_function("lora_backward")(
            grad, x, A, B, 2.0, 0.1, meta(2, dtype=torch.int64), list(wanted)
        )
    others = [made for made in found.made if all(made is not result for result in results)]
    sums = [made for made in others if made.dim() == 3 and made.shape[1] in (d_in, d_out)]
    assert len(sums) == wanted[1] + wanted[2]
    assert all(made.nbytes <= max(ROWS * made.shape[1] * 2 / 8, 2**22) for made in sums)
