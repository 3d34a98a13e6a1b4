"""Grids that CUDA launches, for the largest sizes that are allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shim_memory import MOST_ACROSS

from safe_kernels.triton.lib import cka
from safe_kernels.triton.runtime import host


class Recorder:
    """Stands for a kernel: notes its grid, and runs nothing."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return lambda *args, **options: None

    def check(self, count: int) -> None:
        assert len(self.grids) == count
        assert all(programs <= MOST_ACROSS for _, *rest in self.grids for programs in rest)


@pytest.mark.parametrize(("blocks", "rows", "launches"), [(1, 8192, 6), (70000, 1, 12)])
def test_blocks_of_as_many_rows_as_are_allowed_and_many_blocks(
    monkeypatch: pytest.MonkeyPatch, blocks: int, rows: int, launches: int
) -> None:
    kernel = Recorder()
    for name in ("parts", "means", "h", "grams", "products", "sums", "total"):
        monkeypatch.setattr(cka, f"_block_{name}_kernel", kernel)
    base, h, lora_B = torch.zeros(8192, 1), torch.zeros(1, 8192, 16), torch.zeros(1, 1)
    cka.block_sums(base, h, lora_B, 1.0, torch.zeros(blocks, dtype=torch.int64), rows, None)
    kernel.check(launches)


@pytest.mark.parametrize("shape", [(1, 2**25), (2**25, 1)], ids=str)
def test_rows_as_long_as_can_be_and_as_many(shape: tuple[int, int]) -> None:
    kernel: Any = Recorder()
    host.elementwise(kernel, [torch.zeros(1, 1).expand(shape)], [], host.dropout(0.0, None))
    kernel.check(1)
