"""Values and gradients of `activation`, over kinds, dtypes, shapes, strides and special numbers."""

from __future__ import annotations

import pytest
import torch
from activations import DTYPES, KINDS, assert_results, by_pytorch, expanded, normal, strided, transposed
from oracle import rng_state, taking_turns
from torch import Tensor
from torch.autograd import gradcheck

import safe_kernels
from safe_kernels import reference

SHAPES = ((37, 33), (0, 5), (4, 0), (3, 1), (7,), (2, 3, 65))


def ours(kind: str, x: Tensor, grad: Tensor, dropout_p: float = 0.0, state: Tensor | None = None) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    out = safe_kernels.activation(leaf, kind, dropout_p=dropout_p, rng_state=state)
    return [out.detach(), *torch.autograd.grad(out, [leaf], grad)]


def check(kind: str, x: Tensor, grad: Tensor, dropout_p: float = 0.0) -> None:
    state = rng_state(1) if dropout_p > 0 else None
    assert_results(ours(kind, x, grad, dropout_p, state), kind, (x,), grad, dropout_p, state)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "dropout_p"), taking_turns(list(KINDS), DTYPES, SHAPES, (0.0, 0.3)), ids=str
)
def test_values(kind: str, dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float) -> None:
    check(kind, normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), dropout_p)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_at_a_real_models_size(kind: str, dtype: torch.dtype) -> None:
    check(kind, normal(256, 1536, dtype=dtype), normal(256, 1536, dtype=dtype, seed=1), 0.1)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_agrees_too(kind: str, dtype: torch.dtype, dropout_p: float) -> None:
    x, grad, state = normal(5, 33, dtype=dtype), normal(5, 33, dtype=dtype, seed=1), rng_state(1)
    out = reference.activation(x, kind, dropout_p, state)
    grad_x = reference.activation_backward(grad, x, kind, dropout_p, state)
    assert_results([out, grad_x], kind, (x,), grad, dropout_p, state)


@pytest.mark.parametrize("low", [-100.0, -12.0, -1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_stretch_of_the_axis(kind: str, low: float) -> None:
    """Densely, and each stretch by itself, since an error is judged by the largest value near it."""
    x = torch.linspace(low, -low, 200_001)
    check(kind, x, torch.ones_like(x))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_the_lower_tail_keeps_its_digits(kind: str) -> None:
    """Where 1 + erf or 1 + tanh would cancel."""
    x = torch.linspace(-6, -2, 10_001)
    exact = reference.activation(x.double(), kind)
    error = (safe_kernels.activation(x, kind).double() - exact).abs() / exact.abs()
    assert error.max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_special_numbers(kind: str, dtype: torch.dtype) -> None:
    """As the formula has it, also where PyTorch's has not: gelu(inf) is nan there, and gelu_tanh's slope at 1e20."""
    tiny, largest = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    # Each with its value and its slope; nan where the slope may be what it will.
    table = [
        (torch.inf, torch.inf, torch.nan),
        (-torch.inf, 0.0 if kind == "relu" else torch.nan, torch.nan),  # 0 * inf: a diverged activation is not hidden
        (torch.nan, torch.nan, torch.nan),
        *((sign * 0.0, sign * 0.0, 0.0 if kind == "relu" else 0.5) for sign in (1, -1)),
        (tiny, tiny if kind == "relu" else tiny / 2, 1.0 if kind == "relu" else 0.5),
        *((x, x, 1.0) for x in (90.0, 1e20, largest)),
        *((-x, 0.0, 0.0) for x in (90.0, 1e20, largest)),
    ]
    x, value, slope = (torch.tensor(column * 3, dtype=torch.float64) for column in zip(*table, strict=True))
    x = x.to(dtype)
    out, grad = ours(kind, x, torch.ones_like(x))
    assert torch.allclose(out.double(), value, rtol=1e-2, atol=1e-30, equal_nan=True)
    known = ~slope.isnan()
    assert torch.allclose(grad[known].double(), slope[known], atol=1e-30)
    assert kind == "relu" or grad[x.isnan()].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_special_gradients(kind: str) -> None:
    x = torch.tensor([-3.0, 3.0, -0.0, 0.5] * 5)
    for special in (torch.inf, -torch.inf, torch.nan):
        grad = torch.full_like(x, special)
        got, expected = ours(kind, x, grad)[1], by_pytorch(kind, (x,), grad, None)[1]
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.isinf(), expected.isinf())


@pytest.mark.parametrize("view", [transposed, strided, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(view, dtype: torch.dtype) -> None:
    x, grad = normal(3, 5, 21, dtype=dtype), normal(3, 5, 21, dtype=dtype, seed=1)
    check("gelu", view(x), grad, 0.3)
    check("gelu", x, view(grad), 0.3)
    assert safe_kernels.activation(view(x), "gelu").is_contiguous()


def test_the_row_is_the_flattened_row() -> None:
    x, state = normal(4, 3, 9), rng_state(2)
    out = safe_kernels.activation(x, "gelu", dropout_p=0.5, rng_state=state)
    flat = safe_kernels.activation(x.reshape(12, 9), "gelu", dropout_p=0.5, rng_state=state)
    assert torch.equal(out.reshape(12, 9), flat)


def test_the_state_comes_from_torchs_generator() -> None:
    x = normal(9, 33)
    torch.manual_seed(7)
    first, second = (safe_kernels.activation(x, "silu", dropout_p=0.5) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(safe_kernels.activation(x, "silu", dropout_p=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice_and_on_two_threads(dtype: torch.dtype) -> None:
    x, grad, state = normal(301, 130, dtype=dtype), normal(301, 130, dtype=dtype, seed=1), rng_state(3)
    first, second = ours("gelu", x, grad, 0.1, state), ours("gelu", x, grad, 0.1, state)
    torch.set_num_threads(2)
    third = ours("gelu", x, grad, 0.1, state)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, dropout_p: float) -> None:
    x, state = normal(3, 7, dtype=torch.float64).requires_grad_(), rng_state(4)
    assert gradcheck(lambda x: safe_kernels.activation(x, kind, dropout_p=dropout_p, rng_state=state), (x,))
