"""`rotary` by its Triton kernel against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from activations import normal, strided
from oracle import Truth, assert_as_good
from torch import Tensor

import safe_kernels
from safe_kernels import reference

SHAPES = ((2, 3, 7, 16), (1, 2, 5, 300), (2, 1, 3, 34), (0, 2, 3, 4), (2, 2, 0, 4))
"""Batch, heads, tokens, features."""


def check(x: Tensor, grad: Tensor, cos: Tensor, sin: Tensor) -> None:
    x = x.detach().requires_grad_()
    out = safe_kernels.rotary(x, cos, sin)
    got = [out.detach(), *torch.autograd.grad(out, x, grad)]
    for name, found, value, transposed in zip(("out", "grad_x"), got, (x, grad), (False, True), strict=True):
        rows = value.detach().transpose(1, 2)
        exact = reference.rotary(rows.double(), cos, sin, transposed).transpose(1, 2)
        assert_as_good(name, found, exact.to(x.dtype), Truth({name: exact}, {name: 0.0}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    angles = [normal(1, shape[2], shape[3], dtype=dtype, seed=seed) for seed in (2, 3)]
    check(normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), *angles)


@pytest.mark.parametrize("width", [0, 2, 12])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_strides_a_part_of_the_features_and_one_launch(batch: int, width: int, launches: list[str]) -> None:
    x, grad = normal(2, 3, 7, 20), strided(normal(2, 3, 7, 20, seed=1))
    cos, sin = (strided(normal(batch, 7, width, seed=seed)) for seed in (2, 3))
    check(x.transpose(1, 2).contiguous().transpose(1, 2), grad, cos, sin)
    assert launches == ["_rotary_kernel"] * 2


def test_wrong_shapes_are_refused_below_autograd() -> None:
    x, cos = normal(2, 3, 7, 20), normal(1, 7, 12)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"sin must have shape \[1, 7, 12\]"):
        safe_kernels.rotary(x, cos, cos[:, :5])
