"""`activation`, `gated_activation` and `dropout` by their Triton kernels against PyTorch's functions in float64."""

from __future__ import annotations

import pytest
import torch
from activations import KINDS, assert_results, factor_of, normal, strided, transposed
from oracle import rng_state
from torch import Tensor

import safe_kernels
from safe_kernels import reference
from safe_kernels.retention import measure

TRAINED = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0, 5), (4, 0), (3, 1), (7,), (2, 3, 65))
SUBSETS = [(False, False), (True, False), (False, True), (True, True)]


def call(kind: str, inputs: list[Tensor], dropout_p: float, state: Tensor | None) -> Tensor:
    op = safe_kernels.activation if len(inputs) == 1 else safe_kernels.gated_activation
    return op(*inputs, kind, dropout_p=dropout_p, rng_state=state)


def check(kind: str, inputs: list[Tensor], grad: Tensor, dropout_p: float = 0.0) -> None:
    state = rng_state(1) if dropout_p > 0 else None
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = call(kind, leaves, dropout_p, state)
    grads = torch.autograd.grad(out, leaves, grad)
    assert_results([out.detach(), *grads], kind, inputs, grad, dropout_p, state)


def tensors(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [normal(*shape, dtype=dtype, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", TRAINED, ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=["activation", "gated"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, count: int, dtype: torch.dtype, dropout_p: float) -> None:
    *inputs, grad = tensors(count + 1, 37, 77, dtype=dtype)
    check(kind, inputs, grad, dropout_p)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 2], ids=["activation", "gated"])
def test_shapes(count: int, shape: tuple[int, ...]) -> None:
    *inputs, grad = tensors(count + 1, *shape)
    check("silu", inputs, grad, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_far_out(kind: str) -> None:
    x = torch.linspace(-60, 60, 2001)
    check(kind, [x], torch.ones_like(x))


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_every_subset_of_requires_grad(wanted: tuple[bool, bool], launches: list[str]) -> None:
    gate, up, grad = tensors(3, 5, 33, dtype=torch.bfloat16)
    state = rng_state(1)
    for tensor, flag in zip((gate, up), wanted, strict=True):
        tensor.requires_grad_(flag)
    retained = measure(lambda: call("gelu", [gate, up], 0.2, state))
    if any(wanted):
        retained.output.backward(grad)
    assert retained.bytes == (gate.nbytes + 16 if any(wanted) else 0) + (up.nbytes if wanted[0] else 0)
    assert launches == ["_gated_activation_kernel"] + ["_gated_activation_backward_kernel"] * any(wanted)
    got = [retained.output.detach(), gate.grad, up.grad]
    assert_results(got, "gelu", (gate, up), grad, 0.2, state)


def test_halves_of_one_tensor_and_any_strides() -> None:
    gate, up = normal(37, 66).chunk(2, -1)
    check("silu", [gate, up], strided(normal(37, 33, seed=1)), 0.1)
    check("silu", [transposed(gate), up], normal(1, 1).expand(37, 33))


@pytest.mark.parametrize("kind", KINDS)
def test_special_numbers(kind: str) -> None:
    out = safe_kernels.activation(torch.tensor([torch.nan, torch.inf, 0.0, -0.0, 1e30]), kind)
    assert torch.isnan(out[0])
    assert torch.equal(out[1:], torch.tensor([torch.inf, 0.0, -0.0, 1e30]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", TRAINED, ids=str)
def test_dropout_by_itself(dtype: torch.dtype, dropout_p: float) -> None:
    x, state = normal(9, 37, dtype=dtype).requires_grad_(), rng_state(3)
    out = safe_kernels.dropout(x, dropout_p, rng_state=state)
    factor = factor_of(x, dropout_p, state)
    exact = x.double() if factor is None else x.double() * factor
    torch.testing.assert_close(out, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad, safe_kernels.dropout(torch.ones_like(x), dropout_p, rng_state=state))


def test_float64_is_served_by_the_reference(launches: list[str]) -> None:
    x, state = normal(9, 37, dtype=torch.float64), rng_state(3)
    assert torch.equal(safe_kernels.dropout(x, 0.3, rng_state=state), reference.dropout(x, 0.3, state))
    assert launches == []


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    gate, up = (tensor.requires_grad_() for tensor in tensors(2, 5, 33))
    state = rng_state(1)

    def run(gate: Tensor, up: Tensor) -> Tensor:
        return safe_kernels.gated_activation(gate, up, "silu", dropout_p=0.2, rng_state=state).square().sum()

    expected = torch.autograd.grad(run(gate, up), (gate, up))
    got = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(gate, up), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
