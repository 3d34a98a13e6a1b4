"""`rms_norm` and `layer_norm` by their Triton kernels against the formulas in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from norms import KINDS, MIDDLE, Norm, assert_results, backward_op, norm, results
from oracle import DTYPES, Dtypes

import safe_kernels
from safe_kernels.retention import announce_reader, measure

TRAINED = [dtypes for dtypes in DTYPES if dtypes.x != torch.float64]
SHAPES = ((0, 5), (1, 1), (37, 33), (3, 1031))
BOTH = ("rms", "layer")


def check(p: Norm) -> None:
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("dtypes", TRAINED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_gradients(kind: str, dtypes: Dtypes) -> None:
    check(norm(kind, dtypes=dtypes))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_shapes(kind: str, shape: tuple[int, int]) -> None:
    check(norm(kind, shape, DTYPES[2]))


@pytest.mark.parametrize("mask", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("from_output", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_every_output_mask(kind: str, from_output: bool, mask: tuple[bool, ...]) -> None:
    p = norm(kind)
    got = backward_op(p, from_output, list(mask))
    wanted = dict(zip(("x", "weight", "bias"), mask, strict=True))
    assert all(grad.shape == (0,) for name, grad in got.items() if not wanted[name])
    assert_results(p, {name: grad for name, grad in got.items() if wanted[name]})


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize("retain_output", [True, False])
@pytest.mark.parametrize("kind", BOTH)
def test_the_inputs_gradient_and_what_it_retains(
    kind: str, retain_output: bool, is_read: bool, dtypes: Dtypes, launches: list[str]
) -> None:
    """The input, until a reader keeps the output."""
    p = norm(kind, (2, 3, 33), dtypes).require("x")

    def forward() -> torch.Tensor:
        out = p.call(retain_output)
        if is_read:
            announce_reader(out)
        return out

    retained = measure(forward, exclude=[t for t in (p.weight, p.bias) if t is not None])
    retained.output.backward(p.grad)
    assert_results(p, {"out": retained.output.detach(), "x": p.x.grad})
    has_mean = kind == "layer" and dtypes.x == torch.float32 and not (retain_output and is_read)
    assert retained.bytes == p.x.nbytes + 4 * 6 * (2 if has_mean else 1)
    assert launches == ["_norm_forward_kernel", "_norm_backward_kernel"]


@pytest.mark.parametrize("kind", BOTH)
def test_any_strides(kind: str) -> None:
    p = norm(kind)
    p.x, p.grad = p.x.t().contiguous().t(), torch.stack([p.grad, p.grad], -1)[..., 1]
    p.weight = torch.stack([p.weight, p.weight], -1)[:, 0]
    check(p)


def test_no_features_and_leading_dimensions() -> None:
    assert safe_kernels.rms_norm(torch.ones(3, 0), torch.ones(0), 1e-5).shape == (3, 0)
    check(norm("layer", (33,)))
    check(norm("rms", (3, 0, 2, 33)))


def test_special_numbers_stay_in_their_row() -> None:
    p = norm("layer")
    clean = p.call()
    p.x[5, 2] = torch.nan
    out = p.call()
    others = torch.arange(MIDDLE[0]) != 5
    assert torch.equal(out[others], clean[others])
    assert torch.isnan(out[5]).all()


@pytest.mark.parametrize("kind", BOTH)
def test_what_no_kernel_serves_goes_to_the_reference(kind: str, launches: list[str]) -> None:
    check(norm(kind, dtypes=DTYPES[1]))
    check(norm(kind, (2, 8193)))
    assert launches == []
    check(norm(kind, (2, 8192)))
    assert launches != []


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    p = norm("rms").require("x", "weight")

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.relu(safe_kernels.rms_norm(x, weight, 1e-5)).sum()

    expected = torch.autograd.grad(run(p.x, p.weight), (p.x, p.weight))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(p.x, p.weight), (p.x, p.weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
