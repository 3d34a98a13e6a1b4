"""Values and gradients of `gated_activation`, over kinds, dtypes, shapes, strides and subsets of requires_grad."""

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


def problem(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and the gradient that comes back."""
    return tuple(normal(*shape, dtype=dtype, seed=seed, scale=2.0 if seed == 0 else 1.0) for seed in range(3))


def ours(
    kind: str,
    inputs: tuple[Tensor, Tensor],
    grad: Tensor,
    dropout_p: float = 0.0,
    state: Tensor | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> list[Tensor | None]:
    gate, up = (t.detach().requires_grad_(flag) for t, flag in zip(inputs, wanted, strict=True))
    out = safe_kernels.gated_activation(gate, up, kind, dropout_p=dropout_p, rng_state=state)
    assert out.requires_grad == (out.grad_fn is not None) == any(wanted)
    if any(wanted):
        out.backward(grad)
    assert [gate.grad is not None, up.grad is not None] == list(wanted)
    return [out.detach(), gate.grad, up.grad]


def check(kind: str, gate: Tensor, up: Tensor, grad: Tensor, dropout_p: float = 0.0) -> None:
    state = rng_state(1) if dropout_p > 0 else None
    assert_results(ours(kind, (gate, up), grad, dropout_p, state), kind, (gate, up), grad, dropout_p, state)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "dropout_p"), taking_turns(list(KINDS), DTYPES, SHAPES, (0.0, 0.3)), ids=str
)
def test_values(kind: str, dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float) -> None:
    check(kind, *problem(*shape, dtype=dtype), dropout_p)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_at_a_real_models_size(kind: str, dtype: torch.dtype) -> None:
    check(kind, *problem(256, 1408, dtype=dtype), 0.1)


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_requires_grad(dtype: torch.dtype, dropout_p: float, wanted: tuple[bool, bool]) -> None:
    gate, up, grad = problem(9, 33, dtype=dtype)
    state = rng_state(1)
    got = ours("silu", (gate, up), grad, dropout_p, state, wanted)
    assert_results(got, "silu", (gate, up), grad, dropout_p, state)
    both = ours("silu", (gate, up), grad, dropout_p, state)
    assert all(a is None or torch.allclose(a, b, rtol=1e-6) for a, b in zip(got, both, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_agrees_too(kind: str, dtype: torch.dtype, dropout_p: float) -> None:
    gate, up, grad = problem(5, 33, dtype=dtype)
    state = rng_state(1)
    out = reference.gated_activation(gate, up, kind, dropout_p, state)
    grads = reference.gated_activation_backward(grad, gate, up, kind, dropout_p, state, [True, True])
    assert_results([out, *grads], kind, (gate, up), grad, dropout_p, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [(False, False), (True, False), (False, True)], ids=str)
def test_gradients_that_are_not_wanted_are_empty(mask: tuple[bool, bool], kind: str) -> None:
    gate, up, grad = problem(5, 33)
    arguments = (grad, gate, up, kind, 0.0, None)
    both = torch.ops.safe_kernels.gated_activation_backward(*arguments, [True, True])
    for backward in (torch.ops.safe_kernels.gated_activation_backward, reference.gated_activation_backward):
        for got, full, wanted in zip(backward(*arguments, list(mask)), both, mask, strict=True):
            assert got.shape == (full.shape if wanted else (0,))
            assert not wanted or torch.allclose(got, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", [transposed, strided, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["gate", "up", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype, position: int, view) -> None:
    tensors = list(problem(3, 5, 21, dtype=dtype))
    tensors[position] = view(tensors[position])
    check("gelu", *tensors, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_special_numbers_go_where_pytorch_sends_them(kind: str) -> None:
    special = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3.0, -3.0, 1e20, -1e20, 3e38]
    gate, up = torch.meshgrid(
        torch.tensor(special), torch.tensor([1.0, -2.0, 0.0, torch.inf, torch.nan]), indexing="ij"
    )
    out = safe_kernels.gated_activation(gate, up, kind)
    expected = by_pytorch(kind, (gate.double(), up.double()), torch.ones_like(gate), None)[0]
    assert torch.allclose(out, expected.float(), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_gradient_goes_where_pytorch_sends_it(kind: str) -> None:
    gate, up, grad = problem(4, 33)
    grad[1, ::3], grad[2, ::5] = torch.inf, torch.nan
    got, expected = ours(kind, (gate, up), grad), by_pytorch(kind, (gate, up), grad, None)
    assert all(torch.equal(torch.isfinite(a), torch.isfinite(b)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice_and_on_two_threads(dtype: torch.dtype) -> None:
    gate, up, grad = problem(301, 130, dtype=dtype)
    runs = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        runs.append(ours("gelu", (gate, up), grad, 0.1, rng_state(3)))
    for a, b, c in zip(*runs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, dropout_p: float, wanted: tuple[bool, bool]) -> None:
    gate, up, _ = problem(3, 7, dtype=torch.float64)
    gate.requires_grad_(wanted[0])
    up.requires_grad_(wanted[1])
    state = rng_state(4)

    def call(gate: Tensor, up: Tensor) -> Tensor:
        return safe_kernels.gated_activation(gate, up, kind, dropout_p=dropout_p, rng_state=state)

    assert gradcheck(call, (gate, up))
