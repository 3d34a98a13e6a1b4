"""`lora_linear`: values, gradients, what is retained, what the score is, and what is refused."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from linears import NAMES, Linear, assert_results, linear, results, retained_by
from oracle import DTYPES, Dtypes, Shape
from torch.autograd import gradcheck

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks
from safe_kernels.retention import measure

MIDDLE = Shape(37, 33, 20, 8)
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(len(NAMES) + 1)))


def check(p: Linear) -> None:
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float) -> None:
    check(linear(MIDDLE, dtypes, dropout_p=dropout_p))


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(0, 5, 4, 3), Shape(130, 64, 48, 17)], ids=str)
def test_shapes(shape: Shape) -> None:
    check(linear(shape, has_bias=False))


@pytest.mark.parametrize("leading", [(), (2, 3, 4), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    check(linear(MIDDLE, leading=leading, dropout_p=0.1))


def test_any_strides() -> None:
    p = linear(MIDDLE, leading=(5, 7))
    p.x, p.grad, p.weight = p.x.transpose(0, 1), p.grad.transpose(0, 1), p.weight.t().contiguous().t()
    check(p)


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_requires_grad_and_what_it_retains(names: tuple[str, ...]) -> None:
    p = linear(MIDDLE, DTYPES[4], dropout_p=0.2)
    retained = retained_by(p, names, assert_results, (p.weight, p.bias, p.A, p.B))
    given = set(names)
    only_B = "B" in given and not given & {"weight", "A"}
    drops = given & ({"x", "A"} if only_B else {"x", "A", "B"})
    hidden = p.x.numel() // p.x.shape[-1] * p.A.shape[0] * p.A.element_size()
    kept = hidden if only_B else p.x.nbytes if given & {"weight", "A", "B"} else 0
    assert retained == kept + (16 if drops else 0)


def test_behind_an_activation_it_retains_what_that_does() -> None:
    p = linear(MIDDLE).require("A", "B")
    gate, up = (torch.randn(37, 33, requires_grad=True) for _ in range(2))

    def run() -> torch.Tensor:
        return p.apply(safe_kernels.gated_activation(gate, up, "silu"), p.weight, p.A, p.B, p.bias)

    retained = measure(run, exclude=(p.weight, p.bias, p.A, p.B))
    assert retained.bytes == gate.nbytes + up.nbytes
    got = torch.autograd.grad(retained.output, (gate, up, p.A, p.B), p.grad)
    leaf = safe_kernels.gated_activation(gate, up, "silu")
    out = p.apply(leaf + 0.0, p.weight, p.A, p.B, p.bias)
    assert all(
        torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(out, (gate, up, p.A, p.B), p.grad), strict=True)
    )


def test_the_score_is_loras() -> None:
    p = linear(Shape(128, 33, 20, 8))
    blocks = RowBlocks(torch.tensor([0, 70]), 40, torch.arange(128) % 7 != 0)
    fused, apart = AdapterStatistics(blocks=blocks), AdapterStatistics(blocks=blocks)
    p.call(statistics=fused)
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    safe_kernels.lora(p.x, base, p.A, p.B, p.scaling, statistics=apart)
    torch.testing.assert_close(fused.sums, apart.sums, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    p = linear(Shape(5, 4, 3, 2), DTYPES[1], dropout_p=dropout_p).require(*NAMES)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return p.apply(**dict(zip(p.inputs, tensors, strict=True)))

    assert gradcheck(call, tuple(p.inputs.values()))


@pytest.mark.parametrize("names", [(), ("A", "B"), NAMES], ids=str)
def test_opcheck(names: tuple[str, ...]) -> None:
    p = linear(Shape(12, 9, 7, 3), leading=(3, 4), dropout_p=0.2).require(*names)
    blocks = (torch.tensor([0, 8]), 8, torch.arange(12) != 3)
    arguments = (p.x, p.weight, p.bias, p.A, p.B, 2.0, 0.2, p.rng_state, *blocks)
    torch.library.opcheck(torch.ops.safe_kernels.lora_linear.default, arguments)


def test_opcheck_backward() -> None:
    p = linear(Shape(12, 9, 7, 3), DTYPES[4])
    for mask in ([True] * 5, [True, False, True, False, False], [False, False, False, True, False]):
        x = p.x if mask[1] or mask[3] or mask[4] else None
        arguments = (p.grad, x, p.weight, p.A, p.B, 2.0, 0.0, None, mask)
        torch.library.opcheck(torch.ops.safe_kernels.lora_linear_backward.default, arguments)


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    p = linear(MIDDLE, dropout_p=0.2).require("x", "A", "B")

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.relu(p.apply(x, p.weight, A, B, p.bias)).sum()

    leaves = (p.x, p.A, p.B)
    expected = torch.autograd.grad(run(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_double_backward_is_refused() -> None:
    p = linear(MIDDLE).require("x", "A")
    with pytest.raises(RuntimeError, match="lora_linear cannot be differentiated twice"):
        (grad,) = torch.autograd.grad(p.call().square().sum(), p.x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": torch.zeros(20, 32)}, ValueError, r"weight must have shape \[20, 33\]"),
        ({"weight": torch.zeros(20, 33, dtype=torch.float16)}, TypeError, "x and weight must have one dtype"),
        ({"bias": torch.zeros(19)}, ValueError, r"bias must have shape \[20\]"),
        ({"bias": torch.zeros(20).double()}, TypeError, "bias and weight must have one dtype"),
        ({"x": torch.zeros(4, 32)}, ValueError, "x has last dimension 32"),
        ({"B": torch.zeros(20, 7)}, ValueError, "differ in r"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, object], error: type[Exception], words: str) -> None:
    p = linear(MIDDLE)
    for name, value in changes.items():
        setattr(p, name, value)
    with pytest.raises(error, match=words):
        p.call()
