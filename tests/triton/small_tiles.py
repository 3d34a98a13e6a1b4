"""Tiles so small that a little matrix has many of them, and that a kernel is compiled quickly."""

from __future__ import annotations

from dataclasses import replace

import pytest

from safe_kernels.triton.runtime import configs


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile is larger than it must be, until the test ends."""
    for name in ("TABLE", "NEIGHBOURS"):
        tables = getattr(configs, name).items()
        monkeypatch.setattr(configs, name, {kernel: tuple(map(small, entries)) for kernel, entries in tables})


def small(entry: configs.Config) -> configs.Config:
    """Three terms need no GPU's shared memory then."""
    tiles = {name: 16 for name in ("block_m", "block_n", "block_k") if getattr(entry, name)}
    return replace(entry, **tiles, shared=0 if entry.terms else entry.shared)
