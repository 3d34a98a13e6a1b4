"""`dora`: values, gradients, what is retained, and what is refused."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from doras import NAMES, Dora, dora
from linears import assert_results, results, retained_by
from oracle import DTYPES, Dtypes, Shape
from torch.autograd import gradcheck

import safe_kernels
from safe_kernels.retention import measure

MIDDLE = Shape(37, 33, 20, 8)
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(len(NAMES) + 1)))


def check(p: Dora) -> None:
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float) -> None:
    if dropout_p == 1.0:
        p = dora(MIDDLE, dtypes, dropout_p=dropout_p)
        torch.testing.assert_close(p.call(), torch.nn.functional.linear(p.x, p.weight, p.bias))
    else:
        check(dora(MIDDLE, dtypes, dropout_p=dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d.x != torch.float64], ids=str)
def test_values_at_a_real_models_size(dtypes: Dtypes, dropout_p: float) -> None:
    """Its weight has more rows than one part of the norm."""
    check(dora(Shape(512, 384, 1536, 8), dtypes, dropout_p=dropout_p))


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(0, 5, 4, 3), Shape(130, 64, 48, 17)], ids=str)
def test_shapes(shape: Shape) -> None:
    check(dora(shape, has_bias=False))


def test_a_broken_adapter_shows_in_the_norm_also_with_a_scaling_of_zero() -> None:
    x, weight, A, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    B[2] = torch.nan
    _, norm = torch.ops.safe_kernels.dora(x, weight, None, A, B, torch.ones(4), 0.0)
    assert norm.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("leading", [(), (2, 3, 4), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    check(dora(MIDDLE, leading=leading, dropout_p=0.1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_any_strides(dropout_p: float) -> None:
    p = dora(MIDDLE, leading=(5, 7), dropout_p=dropout_p)
    p.x, p.grad, p.weight = p.x.transpose(0, 1), p.grad.transpose(0, 1), p.weight.t().contiguous().t()
    check(p)
    p.A, p.B = p.A.t().contiguous().t(), p.B.t().contiguous().t()
    check(p)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_new_adapter_changes_nothing(dtypes: Dtypes) -> None:
    """Its magnitude is the norm, as PEFT rounds it."""
    p = dora(MIDDLE, dtypes, dropout_p=0.1)
    p.B.zero_()
    p.magnitude = torch.linalg.norm(p.weight.to(dtypes.adapter), dim=1)
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    torch.testing.assert_close(p.call(), base, rtol=0, atol=2 * torch.finfo(dtypes.adapter).eps)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_the_norm_of_an_adapter_that_nearly_undoes_the_weight(dtypes: Dtypes) -> None:
    """The sum |W|^2 + 2 s (W A')B + s^2 |BA|^2 would cancel here."""
    p = dora(Shape(37, 33, 20, 20), dtypes)
    p.scaling, p.B = 1.0, (-torch.eye(20)).to(dtypes.adapter)
    p.A = (p.weight * (1 + 1e-2 * torch.randn(20, 33, generator=torch.Generator().manual_seed(1)))).to(dtypes.adapter)
    _, norm = torch.ops.safe_kernels.dora(p.x, p.weight, p.bias, p.A, p.B, p.magnitude, 1.0)
    exact = (p.weight.double() - p.A.double()).norm(dim=1)
    plain = torch.linalg.norm(p.weight + p.B @ p.A, dim=1)
    error, allowed = ((value.double() - exact).abs().max() for value in (norm, plain))
    assert error <= 2 * allowed + torch.finfo(norm.dtype).eps * exact.max()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_requires_grad_and_what_it_retains(names: tuple[str, ...], dropout_p: float) -> None:
    p = dora(MIDDLE, DTYPES[4], dropout_p=dropout_p)
    retained = retained_by(p, names, assert_results, (p.weight, p.bias, p.A, p.B, p.magnitude))
    given = set(names)
    only_B = "B" in given and not given & {"A", "magnitude"}
    drops = given & ({"x", "A", "magnitude"} if only_B else {"x", "A", "B", "magnitude"}) if dropout_p else ()
    hidden = p.x.numel() // p.x.shape[-1] * p.A.shape[0] * p.A.element_size()
    kept = hidden if only_B else p.x.nbytes if given & {"A", "B", "magnitude"} else 0
    norm = p.weight.shape[0] * 4 if given - {"bias"} else 0
    assert retained == kept + norm + (16 if drops else 0)


def test_behind_an_activation_it_retains_what_that_does() -> None:
    p = dora(MIDDLE).require("A", "B", "magnitude")
    gate, up = (torch.randn(37, 33, requires_grad=True) for _ in range(2))
    leaves = (gate, up, p.A, p.B, p.magnitude)

    def run() -> torch.Tensor:
        x = safe_kernels.gated_activation(gate, up, "silu")
        return p.apply(x, p.A, p.B, p.magnitude, p.bias)

    retained = measure(run, exclude=(p.weight, p.bias, p.A, p.B, p.magnitude))
    assert retained.bytes == gate.nbytes + up.nbytes + 20 * 4
    got = torch.autograd.grad(retained.output, leaves, p.grad)
    leaf = safe_kernels.gated_activation(gate, up, "silu")
    out = p.apply(leaf + 0.0, p.A, p.B, p.magnitude, p.bias)
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(out, leaves, p.grad), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    """The norm is a constant for the gradients, so the check holds for x, the bias and the magnitude."""
    p = dora(Shape(5, 4, 3, 2), DTYPES[1], dropout_p=dropout_p).require("x", "bias", "magnitude")

    def call(x: torch.Tensor, bias: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        return p.apply(x, p.A, p.B, magnitude, bias)

    assert gradcheck(call, (p.x, p.bias, p.magnitude))


@pytest.mark.parametrize("names", [(), ("A", "B", "magnitude"), NAMES], ids=str)
def test_opcheck(names: tuple[str, ...]) -> None:
    p = dora(Shape(12, 9, 7, 3), leading=(3, 4), dropout_p=0.2).require(*names)
    arguments = (p.x, p.weight, p.bias, p.A, p.B, p.magnitude, 2.0, 0.2, p.rng_state)
    torch.library.opcheck(torch.ops.safe_kernels.dora.default, arguments)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize("mask", [(True,) * 4, (True, False, False, False), (False, True, False, True)], ids=str)
def test_opcheck_backward(mask: tuple[bool, ...], dtypes: Dtypes) -> None:
    p = dora(Shape(12, 9, 7, 3), dtypes)
    norm, x = torch.rand(7).to(dtypes.adapter) + 1, p.x if any(mask[1:]) else None
    arguments = (p.grad, x, p.weight, p.A, p.B, p.magnitude, norm, 2.0, 0.0, None, list(mask))
    torch.library.opcheck(torch.ops.safe_kernels.dora_backward.default, arguments)


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    p = dora(MIDDLE, dropout_p=0.2).require("x", "A", "B", "magnitude")

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        return torch.relu(p.apply(x, A, B, magnitude, p.bias)).sum()

    leaves = (p.x, p.A, p.B, p.magnitude)
    expected = torch.autograd.grad(run(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_does_not_change_the_norm() -> None:
    p = dora(MIDDLE, DTYPES[4], dropout_p=0.2)
    arguments = (p.x, p.weight, p.bias, p.A, p.B, p.magnitude, p.scaling, 0.2, p.rng_state)
    expected = torch.ops.safe_kernels.dora(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.ops.safe_kernels.dora(*arguments), expected))


def test_double_backward_is_refused() -> None:
    p = dora(MIDDLE).require("x", "A")
    with pytest.raises(RuntimeError, match="dora cannot be differentiated twice"):
        (grad,) = torch.autograd.grad(p.call().square().sum(), p.x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": torch.zeros(20, 32)}, ValueError, r"weight must have shape \[20, 33\]"),
        ({"weight": torch.zeros(20, 33, requires_grad=True)}, ValueError, "must not require grad"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias must have shape \[20\]"),
        ({"magnitude": torch.zeros(1, 20)}, ValueError, r"magnitude must have shape \[20\]"),
        ({"magnitude": torch.zeros(20, dtype=torch.int64)}, TypeError, "magnitude must be float64"),
        ({"x": torch.zeros(4, 32)}, ValueError, "x has last dimension 32"),
        ({"B": torch.zeros(20, 7)}, ValueError, "differ in r"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, object], error: type[Exception], words: str) -> None:
    p = dora(MIDDLE)
    for name, value in changes.items():
        setattr(p, name, value)
    with pytest.raises(error, match=words):
        p.call()
