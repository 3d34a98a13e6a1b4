"""`bottleneck`: values, gradients, what is retained, scores, and what is refused."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from bottlenecks import NAMES, Bottleneck, assert_results, bottleneck, formula, results
from linears import retained_by
from oracle import DTYPES, Dtypes, Shape
from torch.autograd import gradcheck

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks, reference
from safe_kernels.retention import measure

KINDS = ("relu", "gelu", "gelu_tanh", "silu")
MIDDLE = Shape(37, 33, 20, 12)
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(len(NAMES) + 1)))


def check(p: Bottleneck) -> None:
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float, kind: str) -> None:
    check(bottleneck(MIDDLE, dtypes, kind=kind, dropout_p=dropout_p))


@pytest.mark.parametrize("kind", ["relu", "silu"])
@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d.x != torch.float64], ids=str)
def test_values_at_a_real_models_size(dtypes: Dtypes, kind: str) -> None:
    check(bottleneck(Shape(512, 384, 384, 24), dtypes, kind=kind, dropout_p=0.1))


SHAPES = [Shape(1, 1, 1, 1), Shape(0, 5, 4, 3), Shape(130, 64, 48, 17), Shape(300, 1500, 40, 7), Shape(9, 5, 4, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape) -> None:
    check(bottleneck(shape))


@pytest.mark.parametrize("shape", [Shape(6, 0, 4, 3), Shape(6, 5, 0, 3), Shape(6, 5, 4, 0)], ids=str)
def test_no_features(shape: Shape) -> None:
    """Random inputs of `oracle` have features, so these are cut."""
    p = bottleneck(Shape(6, 5, 4, 3))
    p.x, p.W_down = p.x[:, : shape.d_in], p.W_down[: shape.rank, : shape.d_in]
    p.residual, p.grad = p.residual[:, : shape.d_out], p.grad[:, : shape.d_out]
    p.b_down, p.b_up, p.W_up = p.b_down[: shape.rank], p.b_up[: shape.d_out], p.W_up[: shape.d_out, : shape.rank]
    got, expected = results(p, p.apply), results(p, formula(p))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_everything_dropped() -> None:
    p = bottleneck(MIDDLE, dropout_p=1.0)
    torch.testing.assert_close(p.call(), p.residual + p.scaling * p.b_up)


@pytest.mark.parametrize("leading", [(), (2, 3, 4), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    check(bottleneck(MIDDLE, leading=leading, dropout_p=0.1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_any_strides(dropout_p: float) -> None:
    p = bottleneck(MIDDLE, leading=(5, 7), dropout_p=dropout_p)
    p.x, p.grad, p.residual = (t.transpose(0, 1) for t in (p.x, p.grad, p.residual))
    p.W_down, p.W_up = p.W_down.t().contiguous().t(), p.W_up.t().contiguous().t()
    p.b_down = torch.stack([p.b_down, p.b_down], 1)[:, 0]
    check(p)


def test_x_may_be_the_residual() -> None:
    p = bottleneck(Shape(37, 20, 20, 6))
    x = p.x.requires_grad_()
    weights = [w.requires_grad_() for w in p.weights]
    got = torch.autograd.grad(p.apply(x, x, *weights), [x, *weights], p.grad)
    expected = torch.autograd.grad(formula(p)(x, x, *weights), [x, *weights], p.grad)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def expected_bytes(p: Bottleneck, names: set[str]) -> int:
    """The rule of docs/retention.md."""
    rows, r = p.x[..., 0].numel(), p.W_down.shape[0]
    z = rows * r * torch.promote_types(p.x.dtype, p.W_down.dtype).itemsize
    if "W_down" in names:
        kept = p.x.nbytes
    elif "W_up" in names and not names & {"x", "b_down"}:
        return z  # the hidden units, with dropout
    elif "W_up" in names:
        kept = z
    elif names & {"x", "b_down"}:
        kept = rows * -(-r // 8) if p.kind == "relu" else z
    else:
        return 0
    return kept + (16 if p.dropout_p else 0)


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_requires_grad_and_what_it_retains(names: tuple[str, ...], dropout_p: float, kind: str) -> None:
    p = bottleneck(MIDDLE, DTYPES[4], kind=kind, dropout_p=dropout_p)
    retained = retained_by(p, names, assert_results, p.weights)
    assert retained == expected_bytes(p, set(names))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [("x",), ("x", "W_up"), NAMES], ids="+".join)
def test_retained_bytes_of_every_dtype(names: tuple[str, ...], kind: str, dtypes: Dtypes) -> None:
    p = bottleneck(MIDDLE, dtypes, kind=kind).require(*names)
    assert measure(p.call, exclude=p.weights).bytes == expected_bytes(p, set(names))


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_under_autocast_z_is_retained_in_autocasts_dtype(kind: str) -> None:
    """As a linear layer's output would be, and x in the copy that all its readers share."""
    for names, size in ((("x",), 37 * 2 if kind == "relu" else 37 * 12 * 2), (("x", "W_down"), 37 * 33 * 2)):
        p = bottleneck(MIDDLE, kind=kind).require(*names)
        with torch.autocast("cpu", torch.bfloat16):
            retained = measure(p.call, exclude=p.weights)
        assert retained.bytes == size
        retained.output.backward(p.grad)
        exact = results(p.double(), formula(p.double()))
        for name in names:
            error = (getattr(p, name).grad.double() - exact[name]).abs().max()
            assert error <= 0.05 * exact[name].abs().max(), name


def test_readers_share_x_with_lora_and_with_each_other() -> None:
    p = bottleneck(MIDDLE).require("W_down")

    def run() -> torch.Tensor:
        return p.call() + p.call() + safe_kernels.lora(p.x, p.residual, p.W_down, p.W_up, 1.0)

    assert measure(run, exclude=p.weights).bytes == p.x.nbytes


def test_behind_an_activation_it_retains_what_that_does() -> None:
    p = bottleneck(MIDDLE).require("W_down")
    gate = torch.randn(37, 33, requires_grad=True)

    def run() -> torch.Tensor:
        return p.apply(safe_kernels.activation(gate, "silu"), p.residual, *p.weights)

    retained = measure(run, exclude=p.weights)
    assert retained.bytes == gate.nbytes
    got = torch.autograd.grad(retained.output, (gate, p.W_down), p.grad)
    out = p.apply(safe_kernels.activation(gate, "silu") + 0.0, p.residual, *p.weights)
    assert all(map(torch.equal, got, torch.autograd.grad(out, (gate, p.W_down), p.grad)))


@pytest.mark.parametrize("names", [("x",), ("W_up",), NAMES], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, names: tuple[str, ...]) -> None:
    p = bottleneck(Shape(5, 4, 3, 2), DTYPES[1], kind=kind, dropout_p=0.3).require(*names)
    assert gradcheck(p.apply, tuple(p.inputs.values()))


def test_a_nan_stays() -> None:
    """It reaches the output and, through a retained bit, the gradient of x, like PyTorch's ReLU."""
    p = bottleneck(MIDDLE).require("x")
    with torch.no_grad():
        p.x[3, 4] = torch.nan
    out = p.call()
    out.backward(p.grad)
    assert out[3].isnan().all() and not out[4].isnan().any()
    x = p.x.detach().clone().requires_grad_()
    formula(p)(x, *list(p.inputs.values())[1:]).backward(p.grad)
    torch.testing.assert_close(p.x.grad, x.grad, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("names", [(), ("x",), ("W_up", "b_up"), NAMES], ids="+".join)
def test_opcheck(names: tuple[str, ...], kind: str) -> None:
    p = bottleneck(Shape(12, 9, 7, 3), kind=kind, leading=(3, 4), dropout_p=0.2).require(*names)
    arguments = (*p.inputs.values(), kind, 0.5, 0.2, p.rng_state)
    torch.library.opcheck(torch.ops.safe_kernels.bottleneck.default, arguments)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize("mask", [(True,) * 5, (True, *[False] * 4), (False,) * 4 + (True,), (True, False, True) * 2])
def test_opcheck_backward(mask: tuple[bool, ...], dtypes: Dtypes) -> None:
    p, mask = bottleneck(Shape(12, 9, 7, 3), dtypes), mask[:5]
    z = None if mask[1] else torch.randn(12, 3)
    x = p.x if mask[1] else None
    arguments = (p.grad, x, z, p.W_down, p.b_down, p.W_up, "gelu", 0.5, 0.0, None, list(mask))
    torch.library.opcheck(torch.ops.safe_kernels.bottleneck_backward.default, arguments)


@pytest.mark.parametrize("kind", ["relu", "gelu"])
@pytest.mark.parametrize("names", [("x",), NAMES], ids="+".join)
def test_compiled_whole(names: tuple[str, ...], kind: str) -> None:
    torch._dynamo.reset()
    p = bottleneck(MIDDLE, kind=kind, dropout_p=0.2).require(*names)
    leaves = [tensor for tensor in p.inputs.values() if tensor.requires_grad]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.relu(p.apply(*tensors)).sum()

    expected = torch.autograd.grad(run(*p.inputs.values()), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*p.inputs.values()), leaves)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[4]], ids=str)
@pytest.mark.parametrize("shape", [Shape(700, 96, 80, 12), Shape(37, 33, 20, 5), Shape(130, 300, 9, 48)], ids=str)
def test_backward_makes_the_same_pre_activation_as_forward(shape: Shape, dtypes: Dtypes) -> None:
    """Otherwise a unit near zero could be on one side in forward and on the other in backward."""
    p = bottleneck(shape, dtypes)
    arguments = (p.W_down, p.b_down, p.W_up, "relu", 1.0, 0.0, None, [True, False, False, False, False])
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        z = torch.ops.safe_kernels.bottleneck(*p.inputs.values(), "relu", 1.0)[1]
        made, given = (torch.ops.safe_kernels.bottleneck_backward(p.grad, p.x, one, *arguments)[0] for one in (None, z))
        assert torch.equal(made, given)
    torch.set_num_threads(threads)


def test_double_backward_is_refused() -> None:
    p = bottleneck(MIDDLE).require("x", "W_down")
    with pytest.raises(RuntimeError, match="bottleneck cannot be differentiated twice"):
        (grad,) = torch.autograd.grad(p.call().square().sum(), p.x, create_graph=True)
        grad.sum().backward()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """In float32, BLAS computes the products of backward."""
    p = bottleneck(Shape(700, 96, 80, 12), DTYPES[4], kind="gelu", dropout_p=0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = results(p, p.apply)
    torch.set_num_threads(2)
    two = results(p, p.apply)
    torch.set_num_threads(threads)
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sums_are_those_of_the_features_without_and_with_the_adapter(dtypes: Dtypes, dropout_p: float) -> None:
    p = bottleneck(Shape(300, 40, 30, 6), dtypes, kind="gelu", dropout_p=dropout_p)
    blocks = RowBlocks.spread(300, blocks=2)
    found, expected = AdapterStatistics(blocks=blocks), AdapterStatistics(blocks=blocks)
    out = p.call(statistics=found)
    assert torch.equal(out, p.call()), "to score changes no bit of the output"
    wide = p.double()
    before, counts = expected.take(wide.residual)
    expected.add_features(before, expected.take(formula(wide)(*wide.inputs.values()))[0], counts)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-3, atol=0)
    arguments = (*p.inputs.values(), p.kind, p.scaling, dropout_p, p.rng_state)
    sums = reference.bottleneck(*arguments, blocks.starts, blocks.block_rows, None)[-1]
    torch.testing.assert_close(found.sums, sums, rtol=1e-3, atol=0)


def test_a_new_adapter_scores_exactly_zero() -> None:
    p = bottleneck(Shape(300, 40, 30, 6))
    p.W_up.zero_()
    statistics = AdapterStatistics(blocks=RowBlocks.spread(300))
    p.call(statistics=statistics)
    assert statistics.one_minus_cka() == 0.0
    assert statistics.rows == 300


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"W_down": torch.zeros(12)}, ValueError, r"W_down must have shape \[r, d_in\]"),
        ({"W_up": torch.zeros(20, 11)}, ValueError, "differ in r: got 12 and 11"),
        ({"W_up": torch.zeros(20, 12).double()}, TypeError, "W_down and W_up must have one dtype"),
        ({"b_down": torch.zeros(11)}, ValueError, r"b_down must have shape \[12\]"),
        ({"b_up": torch.zeros(1, 20)}, ValueError, r"b_up must have shape \[20\]"),
        ({"b_up": torch.zeros(20, dtype=torch.int64)}, TypeError, "b_up must be float64"),
        ({"x": torch.zeros(37, 32)}, ValueError, "x has last dimension 32"),
        ({"residual": torch.zeros(37, 19)}, ValueError, "residual has last dimension 19"),
        ({"residual": torch.zeros(36, 20)}, ValueError, "residual .* and x .* must agree"),
        ({"kind": "tanh"}, ValueError, "activation must be one of 'silu', .* got 'tanh'"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]"),
        ({"scaling": torch.ones((), requires_grad=True)}, TypeError, "scaling must be a number"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, object], error: type[Exception], words: str) -> None:
    p = bottleneck(MIDDLE)
    for name, value in changes.items():
        setattr(p, name, value)
    with pytest.raises(error, match=words):
        p.call()


def test_what_a_backward_needs() -> None:
    p = bottleneck(MIDDLE)
    op = torch.ops.safe_kernels.bottleneck_backward
    arguments = (p.W_down, p.b_down, p.W_up, "relu", 1.0, 0.0, None)
    with pytest.raises(ValueError, match="x is needed for the gradient of W_down"):
        op(p.grad, None, torch.zeros(37, 12), *arguments, [False, True, False, False, False])
    with pytest.raises(ValueError, match="x or z is needed"):
        op(p.grad, None, None, *arguments, [True, False, False, False, False])
    assert op(p.grad, None, None, *arguments, [False] * 4 + [True])[-1].shape == (20,)
