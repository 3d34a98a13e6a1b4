"""Whether to fuse: on a CPU there is nothing to ask, and nothing is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from linears import linear
from oracle import Shape

import safe_kernels
from safe_kernels import fusion
from safe_kernels.triton import tuning

NOTHING: Any = None


def test_where_nothing_is_known_no_argument_is_looked_at() -> None:
    """It stands before every call of a layer."""
    assert safe_kernels.prefers_fused(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING) is False


def test_a_cpu_composes_and_never_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: tuning.Run) -> float:
        raise AssertionError("nothing is timed on a CPU")

    monkeypatch.setattr(tuning, "milliseconds", refuse)
    monkeypatch.setattr(fusion, "FASTER", {"cuda-90": frozenset({"layer 64x64x32x8 float32 float32"})})
    p = linear(Shape(37, 33, 20, 8))
    with safe_kernels.autotune(cache=tmp_path):
        assert not safe_kernels.prefers_fused(p.x, p.weight, p.bias, p.A, p.B, dropout_p=0.1)
    assert not safe_kernels.prefers_fused(p.x, p.weight, p.bias, p.A, p.B)
    assert torch.equal(p.call(), p.call())
