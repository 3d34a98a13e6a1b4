"""Values of `rms_norm` and `layer_norm`, over strides and special numbers; over shapes in test_norm_backward.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from norms import KINDS, MIDDLE, Norm, assert_results, norm, plain
from oracle import DTYPES, Dtypes

import safe_kernels
from safe_kernels import reference

BOTH = ("rms", "layer")


def check(p: Norm) -> None:
    assert_results(p, {"out": p.call()})


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_agrees_too(kind: str, dtypes: Dtypes) -> None:
    p = norm(kind, dtypes=dtypes)
    if kind.startswith("rms"):
        out, *statistics = reference.rms_norm(p.x, p.weight, p.eps, p.offset)
        ours = torch.ops.safe_kernels.rms_norm(p.x, p.weight, p.eps, p.offset)
    else:
        out, *statistics = reference.layer_norm(p.x, p.weight, p.bias, p.eps)
        ours = torch.ops.safe_kernels.layer_norm(p.x, p.weight, p.bias, p.eps)
    assert_results(p, {"out": out})
    for own, other in zip(ours[1:], statistics, strict=True):
        assert own.dtype == other.dtype == (torch.float64 if dtypes.x == torch.float64 else torch.float32)
        assert own.shape == other.shape == p.x.shape[:-1]
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


def test_float64_weights_make_the_sums_in_float64() -> None:
    p = norm("layer")
    p.weight, p.bias = p.weight.double(), p.bias.double()
    out, _, rstd = torch.ops.safe_kernels.layer_norm(p.x, p.weight, p.bias, p.eps)
    assert (out.dtype, rstd.dtype) == (torch.float32, torch.float64)
    assert_results(p, {"out": out})


@pytest.mark.parametrize("leading", [(), (1,), (2, 5), (1, 1, 1, 6), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_any_leading_dimensions(kind: str, leading: tuple[int, ...]) -> None:
    p = norm(kind, (*leading, 33))
    assert p.call().shape == (*leading, 33)
    check(p)


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([torch.full((3,), torch.nan, dtype=t.dtype), t.flatten()])[3:].view(t.shape),
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded columns": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
def test_any_strides(kind: str, view: str, dtypes: Dtypes) -> None:
    p = norm(kind, dtypes=dtypes)
    p.x = VIEWS[view](p.x)
    check(p)


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_of_any_strides(kind: str) -> None:
    p = norm(kind)
    p.weight = VIEWS["strided"](p.weight)
    p.bias = p.bias if p.bias is None else p.bias[:1].expand(33)
    check(p)


@pytest.mark.parametrize("kind", BOTH)
def test_output_is_new_memory_laid_out_as_pytorch_does(kind: str) -> None:
    """Elementwise code keeps strides: heads that lie one after another are joined without a copy afterwards."""
    p = norm(kind, (5, 2, 7, 33))
    p.x, p.grad = p.x.transpose(0, 2), p.grad.transpose(0, 2)
    check(p)
    before = p.x.clone()
    out = p.call()
    assert out.stride() == (p.x * 2.0 if kind.startswith("rms") else F.layer_norm(p.x, (33,))).stride()
    out.fill_(7)
    assert torch.equal(p.x, before), "an input was written to"


@pytest.mark.parametrize("eps", [0.0, 1e-12, 10.0])
@pytest.mark.parametrize("kind", BOTH)
def test_eps(kind: str, eps: float) -> None:
    p = norm(kind)
    p.eps = eps
    check(p)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_mean_far_from_zero(dtypes: Dtypes) -> None:
    """A variance made as mean(x^2) - mean(x)^2 would have nothing left of it in float32."""
    p = norm("layer", (37, 384), dtypes)
    p.x = p.x + 300
    check(p)


@pytest.mark.parametrize("kind", BOTH)
def test_a_constant_row(kind: str) -> None:
    p = norm(kind)
    p.x[3] = 0
    check(p)
    assert torch.isfinite(p.call()).all()


@pytest.mark.parametrize("width", [32, 100])
@pytest.mark.parametrize("value", [0.02, 0.1, 3.3])
def test_the_mean_of_a_constant_row_is_exact(value: float, width: int) -> None:
    """As PyTorch's is. 1 / rstd is small there, so the rounding of a mean would be 300 times as large in the output."""
    x, weight, bias = torch.full((2, width), value), torch.rand(width) + 0.8, torch.rand(width)
    assert torch.equal(safe_kernels.layer_norm(x, weight, bias, 1e-5), bias.expand(2, width))


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", BOTH)
def test_special_numbers_stay_in_their_row(kind: str, special: float) -> None:
    p = norm(kind)
    clean = p.call()
    p.x[5, 2] = special
    out, others = p.call(), torch.arange(MIDDLE[0]) != 5
    assert torch.equal(out[others], clean[others])
    assert torch.equal(torch.isnan(out), torch.isnan(plain(p)["out"]))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]], ids=str)
def test_same_bits_twice_and_on_two_threads(kind: str, dtypes: Dtypes) -> None:
    p = norm(kind, (1000, 100), dtypes)
    first, second = p.call(), p.call()
    torch.set_num_threads(2)
    assert torch.equal(first, second)
    assert torch.equal(first, p.call())


@pytest.mark.parametrize("kind", BOTH)
def test_no_features(kind: str) -> None:
    assert norm(kind, (3, 0)).call().shape == (3, 0)


def test_no_node_under_no_grad() -> None:
    for kind in BOTH:
        p = norm(kind).require("x", "weight", "bias")
        with torch.no_grad():
            assert p.call().grad_fn is None
        with torch.inference_mode():
            assert torch.equal(p.call(), p.call(retain_output=False))


def test_weight_offset_is_added_in_the_dtype_of_sums() -> None:
    x, weight = torch.randn(4, 8).bfloat16(), torch.full((8,), 2.0**-10).bfloat16()
    wide = safe_kernels.rms_norm(x.float(), weight.float(), 1e-6, weight_offset=1.0)
    assert torch.equal(safe_kernels.rms_norm(x, weight, 1e-6, weight_offset=1.0), wide.bfloat16())
