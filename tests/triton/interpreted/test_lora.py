"""`lora` by its Triton kernels against the formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, assert_results, ours, plain, problem, rng_state
from torch import Tensor

import safe_kernels
from safe_kernels import reference
from safe_kernels.retention import measure

MIDDLE = Shape(37, 90, 77, 5)
SMALL = Shape(20, 90, 77, 5)
"""For many cases: fewer tiles of rows, with a ragged end still."""
SUBSETS = list(product([False, True], repeat=4))
NAMES = ("x", "base", "A", "B")
TRAINED = [dtypes for dtypes in DTYPES if dtypes.x != torch.float64]
FORWARD = ["_lora_sweep_kernel", "_lora_apply_kernel"]


def check(p: Problem) -> None:
    assert_results(p, ours(p, safe_kernels.lora))


def subset_id(flags: tuple[bool, ...]) -> str:
    return "+".join(name for name, flag in zip(NAMES, flags, strict=True) if flag) or "none"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", TRAINED, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float) -> None:
    check(problem(MIDDLE, dtypes, dropout_p=dropout_p))


SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(16, 16, 32, 16),
    Shape(33, 20, 150, 17),
    Shape(20, 30, 10, 70),
    Shape(20, 30, 10, 130),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_shapes(shape: Shape, dtypes: Dtypes) -> None:
    check(problem(shape, dtypes, dropout_p=0.1))


@pytest.mark.parametrize("leading", [(), (2, 3, 4), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    check(problem(MIDDLE, leading=leading, dropout_p=0.1))


@pytest.mark.parametrize("shape", [Shape(7, 0, 5, 3), Shape(7, 6, 5, 0), Shape(0, 6, 5, 0)], ids=str)
def test_nothing_to_add_gives_the_base(shape: Shape) -> None:
    p = problem(Shape(shape.rows, 6, 5, 3))
    x, A, B = p.x[:, : shape.d_in], p.A[: shape.rank, : shape.d_in], p.B[:, : shape.rank]
    tensors = [tensor.requires_grad_() for tensor in (x.detach(), A.detach(), B.detach())]
    out = safe_kernels.lora(tensors[0], p.base, tensors[1], tensors[2], 2.0)
    assert torch.equal(out, p.base)
    out.sum().backward()
    assert all(tensor.grad.shape == tensor.shape and not tensor.grad.any() for tensor in tensors)


def test_everything_strided_at_once() -> None:
    p = problem(MIDDLE, leading=(5, 7), dropout_p=0.2)
    p.x, p.base, p.grad = (tensor.transpose(0, 1) for tensor in (p.x, p.base, p.grad))
    p.A, p.B = p.A.t().contiguous().t(), torch.stack([p.B, p.B], -1)[..., 0]
    check(p)


def test_an_expanded_gradient() -> None:
    p = problem(MIDDLE)
    p.grad = torch.ones(1, 1).expand(MIDDLE.rows, MIDDLE.d_out)
    check(p)


def test_x_and_base_of_different_precision_as_under_autocast() -> None:
    p = problem(MIDDLE)
    p.base, p.grad = p.base.bfloat16(), p.grad.bfloat16()
    check(p)
    p.require(A=False, B=False)
    p.call(safe_kernels.lora).backward(p.grad)
    assert p.x.grad.dtype == torch.float32


@pytest.mark.parametrize("flags", SUBSETS, ids=subset_id)
def test_every_subset_of_requires_grad(flags: tuple[bool, ...], launches: list[str]) -> None:
    """What is not wanted is not computed: each subset launches what it needs."""
    p = problem(SMALL, DTYPES[4], dropout_p=0.2).require(*flags)
    retained = measure(lambda: p.call(safe_kernels.lora), exclude=(p.A, p.B))
    out = retained.output
    x, _, A, B = flags
    hidden = B and not A  # then forward makes h = dropout(x) A' as well, which is kept in the place of x
    forward = FORWARD * (1 + hidden)
    assert launches == forward
    if any(flags):
        out.backward(p.grad)
    grads = {name: tensor.grad for name, tensor in zip(NAMES, p.inputs, strict=True) if tensor.grad is not None}
    assert set(grads) == {name for name, flag in zip(NAMES, flags, strict=True) if flag}
    assert_results(p, {"out": out.detach(), **grads})
    kept = SMALL.rows * SMALL.rank * p.A.element_size() if hidden else p.x.nbytes if A or B else 0
    assert retained.bytes == kept + (16 if x or A else 0)
    # h, grad_h with B's gradient, the parts of both added by one launch, and A's gradient.
    expected = ["_lora_sweep_kernel"] * (B + (x or A)) + ["_reduce_kernel"] * (B or x or A)
    expected += ["_lora_input_kernel"] * (x or A) + ["_reduce_kernel"] * A
    if hidden:
        expected = ["_lora_sweep_kernel", "_lora_input_kernel", "_reduce_kernel"]
        expected += ["_lora_sweep_kernel", "_reduce_kernel", "_lora_input_kernel"] * x
    assert launches[len(forward) :] == expected


@pytest.mark.parametrize(
    ("rank", "dtypes", "input_passes"), [(16, DTYPES[2], 1), (17, DTYPES[2], 2), (5, DTYPES[0], 2)]
)
def test_one_pass_over_grad_where_its_parts_are_small(
    rank: int, dtypes: Dtypes, input_passes: int, launches: list[str]
) -> None:
    check(problem(Shape(40, 20, 30, rank), dtypes))
    assert launches.count("_lora_input_kernel") == input_passes


def test_float64_is_served_by_the_reference(launches: list[str]) -> None:
    p = problem(MIDDLE, DTYPES[1])
    check(p)
    assert launches == []


def kept_by_the_op(rows: int, columns: int, dropout_p: float, state: Tensor) -> Tensor:
    x, eye = torch.ones(rows, columns), torch.eye(columns)
    return safe_kernels.lora(x, 0 * x, eye, eye, 1.0, dropout_p=dropout_p, rng_state=state) != 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("columns", [1, 5, 32, 77])
@pytest.mark.parametrize("dropout_p", [0.5, 0.1])
def test_the_mask_bit_for_bit(dropout_p: float, columns: int, seed: int) -> None:
    state = rng_state(seed)
    expected = reference.dropout_keep(70, columns, dropout_p, state)
    assert torch.equal(kept_by_the_op(70, columns, dropout_p, state), expected)


def test_the_threshold_itself_is_kept() -> None:
    state = torch.tensor([11, 12])
    counter = tuple(map(torch.tensor, (1, 2, 12, 0)))
    words = [int(word) for word in reference.philox(counter, (torch.tensor(11), torch.tensor(0)))]
    for column in range(8):
        bits = words[column // 2] >> 16 * (column % 2) & 0xFFFF
        assert kept_by_the_op(3, 16, bits / 2**16, state)[2, 8 + column]
        assert not kept_by_the_op(3, 16, (bits + 1) / 2**16, state)[2, 8 + column]


@pytest.mark.parametrize("dropout_p", [2**-18, 2**-16, 16 * 2**-16, 1 - 2**-16, 1 - 2**-40])
def test_probabilities_near_0_and_1(dropout_p: float) -> None:
    """2**-16 is a threshold of 1, which the compiler makes a constant; below it nothing is dropped."""
    state = rng_state(3)
    expected = reference.dropout_keep(70, 77, dropout_p, state)
    assert torch.equal(kept_by_the_op(70, 77, dropout_p, state), expected)
    x = torch.ones(70, 77)
    dropped = safe_kernels.dropout(x, dropout_p, rng_state=state)
    torch.testing.assert_close(dropped, reference.dropout(x, dropout_p, state))


def test_all_dropped_is_the_base() -> None:
    p = problem(MIDDLE, dropout_p=1.0)
    assert torch.equal(p.call(safe_kernels.lora), p.base)


def test_the_same_bits_whatever_the_order_of_programs() -> None:
    p = problem(MIDDLE, DTYPES[2], dropout_p=0.1)
    first, second = ours(p, safe_kernels.lora), ours(p, safe_kernels.lora)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_special_numbers_stay_in_their_row(special: float) -> None:
    p = problem(MIDDLE)
    clean = p.call(safe_kernels.lora)
    p.x[5, 2] = special
    out = p.call(safe_kernels.lora)
    others = torch.arange(MIDDLE.rows) != 5
    assert torch.equal(out[others], clean[others])
    assert torch.equal(torch.isnan(out), torch.isnan(plain(p)["out"]))


def test_zero_scaling_and_a_new_adapter_give_the_base_bit_for_bit() -> None:
    p = problem(MIDDLE)
    assert torch.equal(safe_kernels.lora(*p.inputs, 0.0), p.base)
    assert torch.equal(safe_kernels.lora(p.x, p.base, p.A, torch.zeros_like(p.B), 2.0), p.base)


MATMUL = torch.backends.cuda.matmul


@pytest.fixture(params=["allow_tf32", "fp32_precision"])
def _tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of PyTorch's two ways; the older one's name cannot be read after the newer was used."""
    before = MATMUL.fp32_precision
    setattr(MATMUL, request.param, "tf32" if request.param == "fp32_precision" else True)
    yield
    MATMUL.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
def test_tf32_when_torch_allows_it() -> None:
    p = problem(MIDDLE)
    coarse = p.call(safe_kernels.lora)
    exact = plain(p)["out"]
    assert (coarse - exact).abs().max() > 1e-4
    torch.testing.assert_close(coarse, exact, rtol=0, atol=2e-2)


def test_opcheck() -> None:
    p = problem(Shape(12, 9, 7, 3), leading=(3, 4), dropout_p=0.2).require()
    blocks = (torch.tensor([0, 8]), 8, torch.arange(12) != 3)
    torch.library.opcheck(torch.ops.safe_kernels.lora.default, (*p.inputs, 2.0, 0.2, p.rng_state, *blocks))


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    p = problem(MIDDLE, dropout_p=0.2).require(base=False)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return torch.relu(safe_kernels.lora(x, p.base, A, B, 2.0, dropout_p=0.2, rng_state=p.rng_state)).sum()

    leaves = (p.x, p.A, p.B)
    expected = torch.autograd.grad(run(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
