"""The op `rotary`: values, what is retained, derivatives of any order, and refusals."""

from __future__ import annotations

import pytest
import torch
from activations import DTYPES, normal, strided, transposed
from oracle import Truth, assert_as_good
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

import safe_kernels
from safe_kernels import reference
from safe_kernels.retention import measure

SHAPES = ((2, 3, 5, 8), (1, 1, 1, 2), (3, 2, 7, 34), (0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (1, 2, 3, 0))
"""Batch, heads, tokens, features."""


def formula(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """As transformers writes it, for the first features of each head."""
    width, cos, sin = cos.shape[-1], cos.unsqueeze(1), sin.unsqueeze(1)
    x, rest = x[..., :width], x[..., width:]

    def turned(y: Tensor) -> Tensor:
        return torch.cat((-y[..., width // 2 :], y[..., : width // 2]), -1)

    out = x * cos - turned(x * sin) if transposed else x * cos + turned(x) * sin
    return torch.cat((out, rest), -1)


def angles(shape: tuple[int, ...], dtype: torch.dtype, batch: int = 1, width: int | None = None) -> list[Tensor]:
    """Two tensors of any numbers: the op does not need cosines."""
    size = (batch, shape[2], shape[3] if width is None else width)
    return [normal(*size, dtype=dtype, seed=seed) for seed in (2, 3)]


def check(x: Tensor, grad: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> None:
    for op in (safe_kernels.rotary, swapped):
        leaf = x.detach().requires_grad_()
        out = op(leaf, cos, sin, transposed=transposed)
        got = [out.detach(), *torch.autograd.grad(out, leaf, grad)]
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        exact, plain = (results(x, grad, cos, sin, transposed, dtype) for dtype in (torch.float64, x.dtype))
        for name, found, truth, usual in zip(("out", "grad_x"), got, exact, plain, strict=True):
            assert_as_good(name, found, usual, Truth({name: truth}, {name: 0.0}))


def results(x: Tensor, grad: Tensor, cos: Tensor, sin: Tensor, transposed: bool, dtype: torch.dtype) -> list[Tensor]:
    leaf = x.detach().to(dtype).requires_grad_()
    out = formula(leaf, cos.to(dtype), sin.to(dtype), transposed)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(dtype))]


def swapped(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    return reference.rotary(x.transpose(1, 2), cos, sin, transposed).transpose(1, 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], transposed: bool) -> None:
    x, grad = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    check(x, grad, *angles(shape, dtype), transposed)


@pytest.mark.parametrize("width", [0, 2, 6, 8])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_of_each_sample_and_a_part_of_the_features(dtype: torch.dtype, batch: int, width: int) -> None:
    shape = (2, 3, 5, 8)
    check(normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype), *angles(shape, torch.float32, batch, width))


@pytest.mark.parametrize("view", [transposed, strided, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
def test_any_strides(view) -> None:
    shape = (2, 3, 5, 8)
    tensors = [normal(*shape), normal(*shape, seed=1), *angles(shape, torch.float32)]
    for position, tensor in enumerate(tensors):
        changed = view(tensor) if tensor.dim() == 4 else strided(tensor)
        check(*tensors[:position], changed, *tensors[position + 1 :])


def test_cos_and_sin_alone_are_retained_as_by_the_formula() -> None:
    shape = (2, 3, 5, 8)
    x, (cos, sin) = normal(*shape).requires_grad_(), angles(shape, torch.float32)
    for op in (safe_kernels.rotary, formula):
        assert measure(lambda op=op: op(x, cos, sin)).bytes == cos.nbytes + sin.nbytes
        assert measure(lambda op=op: op(x.detach(), cos, sin)).bytes == 0


def test_x_may_be_changed_afterwards_and_cos_not() -> None:
    shape = (2, 3, 5, 8)
    source, (cos, sin) = normal(*shape).requires_grad_(), angles(shape, torch.float32)
    x = source * 1.0
    out = safe_kernels.rotary(x, cos, sin)
    x.zero_()
    (got,) = torch.autograd.grad(out.sum(), source, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(formula(source, cos, sin).sum(), source)[0])
    cos.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_derivatives_of_any_order() -> None:
    shape = (2, 3, 2, 6)
    x, (cos, sin) = normal(*shape, dtype=torch.float64).requires_grad_(), angles(shape, torch.float64, 2, 4)
    for transposed_too in (False, True):
        arguments = (lambda x, t=transposed_too: safe_kernels.rotary(x, cos, sin, transposed=t), (x,))
        assert gradcheck(*arguments)
        assert gradgradcheck(*arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_two_threads(dtype: torch.dtype) -> None:
    x, (cos, sin) = normal(2, 5, 301, 32, dtype=dtype), angles((2, 5, 301, 32), dtype, 2)
    one = safe_kernels.rotary(x, cos, sin)
    torch.set_num_threads(2)
    assert torch.equal(safe_kernels.rotary(x, cos, sin), one)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    x = normal(2, 5, 3, 8).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.safe_kernels.rotary.default, (x, *angles((2, 3, 5, 8), torch.float32), False))


def test_fake_tensors_have_the_real_ones_metadata() -> None:
    tensors = [strided(normal(2, 5, 3, 8, dtype=torch.bfloat16)), *angles((2, 3, 5, 8), torch.float32, 2, 6)]
    real = torch.ops.safe_kernels.rotary(*tensors)
    with FakeTensorMode() as mode:
        fake = torch.ops.safe_kernels.rotary(*map(mode.from_tensor, tensors))
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    x, (cos, sin) = normal(2, 3, 5, 8).requires_grad_(), angles((2, 3, 5, 8), torch.float32)
    compiled = torch.compile(safe_kernels.rotary, fullgraph=True, backend="aot_eager")
    got, plain = compiled(x * 2, cos, sin), safe_kernels.rotary(x * 2, cos, sin)
    assert torch.equal(got, plain)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"x": torch.ones(2, 3, 5, 8, dtype=torch.int64)}, TypeError, ["x", "float32", "Long"]),
        ({"x": torch.ones(3, 5, 8)}, ValueError, ["x", "four dimensions", "[3, 5, 8]"]),
        ({"cos": torch.ones(3, 5, 8)}, ValueError, ["cos", "[1 or 2, 5, at most 8]", "[3, 5, 8]"]),
        ({"cos": torch.ones(1, 4, 8)}, ValueError, ["cos", "[1, 4, 8]"]),
        ({"cos": torch.ones(1, 5, 10), "sin": torch.ones(1, 5, 10)}, ValueError, ["cos", "at most 8"]),
        ({"cos": torch.ones(1, 5, 3), "sin": torch.ones(1, 5, 3)}, ValueError, ["cos", "even"]),
        ({"sin": torch.ones(2, 5, 8)}, ValueError, ["sin", "cos", "[2, 5, 8]"]),
        ({"sin": torch.ones(1, 5, 8).double()}, TypeError, ["sin", "cos", "Double"]),
        ({"cos": torch.ones(1, 5, 8, requires_grad=True)}, NotImplementedError, ["cos", "detach"]),
        ({"sin": torch.ones(1, 5, 8, requires_grad=True)}, NotImplementedError, ["sin", "detach"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_message_says_what_is_wrong(changes: dict, kind: type[Exception], words: list[str]) -> None:
    tensors = {"x": torch.ones(2, 3, 5, 8), "cos": torch.ones(1, 5, 8), "sin": torch.ones(1, 5, 8)}
    with pytest.raises(kind) as error:
        safe_kernels.rotary(**{**tensors, **changes})
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), str(error.value)
    if kind is ValueError:
        with torch.inference_mode(), pytest.raises(ValueError):
            safe_kernels.rotary(**{**tensors, **changes})
