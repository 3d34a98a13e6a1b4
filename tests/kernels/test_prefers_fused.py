"""Whether to fuse: on a CPU there is nothing to ask, and nothing is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from linears import linear
from oracle import Shape

import safe_kernels
from safe_kernels.triton.runtime import tuning


def test_a_cpu_composes_and_never_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: tuning.Run) -> float:
        raise AssertionError("nothing is timed on a CPU")

    monkeypatch.setattr(tuning, "milliseconds", refuse)
    p = linear(Shape(37, 33, 20, 8))
    with safe_kernels.autotune(cache=tmp_path):
        assert not safe_kernels.prefers_fused(p.x, p.weight, p.bias, p.A, p.B, dropout_p=0.1)
    assert not safe_kernels.prefers_fused(p.x, p.weight, p.bias, p.A, p.B)
    assert torch.equal(p.call(), p.call())
