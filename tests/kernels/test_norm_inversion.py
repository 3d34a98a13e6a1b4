"""`invertible`: what it lets through keeps the gradient exact, and what would not is refused."""

from __future__ import annotations

import pytest
import torch
from norms import assert_results, norm, plain, truth
from oracle import DTYPES, Dtypes

from safe_kernels import invertible
from safe_kernels.inversion import LIMIT

ONE_DTYPE = [dtypes for dtypes in DTYPES if dtypes.x == dtypes.adapter]


@pytest.mark.parametrize("aligned", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("dtypes", ONE_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [(64, 33), (64, 384)], ids=str)
def test_at_the_limit_the_gradient_is_as_good_as_pytorchs(
    shape: tuple[int, int], dtypes: Dtypes, aligned: float
) -> None:
    p = norm("layer", shape, dtypes, ratio=0.99 * LIMIT, aligned=aligned).require("x")
    assert invertible(p.weight, p.bias)
    (grad_x,) = torch.autograd.grad(p.call(), p.x, p.grad)
    assert_results(p, {"x": grad_x})
    exact = truth(p).exact["x"]
    error, allowed = ((tensor.double() - exact).norm() for tensor in (grad_x, plain(p)["x"]))
    assert error <= 2 * allowed, "no allowance for roundings here: a mean over many elements has no luck"


@pytest.mark.parametrize("dtypes", [d for d in ONE_DTYPE if d.x != torch.float64], ids=str)
def test_far_beyond_the_limit_it_is_not(dtypes: Dtypes) -> None:
    """Were it as good, the limit would be needless."""
    p = norm("layer", (64, 384), dtypes, ratio=16 * LIMIT, aligned=1.0).require("x")
    assert not invertible(p.weight, p.bias)
    exact, incumbent = truth(p).exact["x"], plain(p)["x"]
    errors = []
    for retain_output in (True, False):
        (grad_x,) = torch.autograd.grad(p.call(retain_output), p.x, p.grad)
        errors.append((grad_x.double() - exact).norm())
    allowed = (incumbent.double() - exact).norm()
    assert errors[0] > 4 * allowed
    assert errors[1] <= 2 * allowed


@pytest.mark.parametrize("value", [0.0, -0.0, torch.inf, torch.nan, 1e-40])
def test_a_weight_that_cannot_be_divided_by(value: float) -> None:
    weight = torch.ones(5)
    assert invertible(weight)
    weight[3] = value
    assert not invertible(weight)
    assert not invertible(weight, torch.zeros(5))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1.01 * LIMIT, -1.01 * LIMIT])
def test_a_bias_that_hides_its_weight(value: float) -> None:
    bias = torch.zeros(5)
    assert invertible(torch.ones(5), bias)
    bias[3] = value
    assert not invertible(torch.ones(5), bias)
    assert not invertible(None, bias)


def test_the_offset_belongs_to_the_weight() -> None:
    assert invertible(torch.zeros(5), weight_offset=1.0)
    assert not invertible(torch.full((5,), -1.0), weight_offset=1.0)
    assert not invertible(torch.tensor([1.0, -1.0]), None, 1.0)


def test_the_outputs_dtype_counts() -> None:
    weight = torch.full((5,), 1e-5)
    assert invertible(weight)
    assert invertible(weight, dtype=torch.bfloat16)
    assert not invertible(weight, dtype=torch.float16), "below float16's normal numbers"


def test_nothing_to_invert() -> None:
    assert invertible(None)
    assert invertible(None, None)
    assert invertible(torch.ones(0), torch.ones(0))


def test_a_limit_of_ones_own() -> None:
    weight, bias = torch.ones(5), torch.full((5,), 7.0)
    assert not invertible(weight, bias)
    assert invertible(weight, bias, limit=8.0)


def test_parameters_are_looked_at_not_touched() -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    assert invertible(weight, torch.nn.Parameter(torch.zeros(5))) is True
    assert weight.grad is None


@pytest.mark.parametrize("retain_output", [True, False])
def test_a_zero_weight_needs_the_input(retain_output: bool) -> None:
    p = norm("rms").require("x")
    p.weight[3] = 0
    (grad_x,) = torch.autograd.grad(p.call(retain_output), p.x, p.grad)
    if retain_output:
        assert not torch.isfinite(grad_x).all(), "which is why the caller has to ask `invertible`"
    else:
        assert_results(p, {"x": grad_x})
