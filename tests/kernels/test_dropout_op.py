"""The op `dropout`: values, bits, what is retained, and derivatives of any order."""

from __future__ import annotations

import pytest
import torch
from activations import DTYPES, expanded, factor_of, normal, strided, transposed
from oracle import rng_state
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import safe_kernels
from safe_kernels import functional, reference
from safe_kernels.retention import measure

SHAPES = ((37, 33), (0, 5), (4, 0), (3, 1), (7,), (2, 3, 65))


def expected(x: Tensor, dropout_p: float, state: Tensor) -> Tensor:
    """Rounded once."""
    factor = factor_of(x, dropout_p, state)
    return x if factor is None else (x.double() * factor).to(x.dtype)


def equal_to_rounding(got: Tensor, exact: Tensor) -> bool:
    """Zeros where they must be, and else no more than the rounding of the scale and of the product apart."""
    same = torch.equal(got == 0, exact == 0)
    return same and torch.allclose(got.double(), exact.double(), rtol=2 * torch.finfo(got.dtype).eps, atol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float) -> None:
    x, grad, state = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), rng_state(2)
    x.requires_grad_()
    for op in (safe_kernels.dropout, reference.dropout):
        out = op(x, dropout_p, rng_state=state)
        assert (out.shape, out.dtype, out.is_contiguous()) == (x.shape, x.dtype, True)
        assert equal_to_rounding(out.detach(), expected(x.detach(), dropout_p, state))
        (got,) = torch.autograd.grad(out, x, grad)
        assert equal_to_rounding(got, expected(grad, dropout_p, state))


def test_at_zero_it_copies_bit_for_bit() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -0.0, 1e-42]])
    out = safe_kernels.dropout(x, 0.0)
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("view", [transposed, strided, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_any_strides(dropout_p: float, dtype: torch.dtype, view) -> None:
    x, state = normal(3, 5, 21, dtype=dtype), rng_state(1)
    out = safe_kernels.dropout(view(x), dropout_p, rng_state=state)
    assert out.is_contiguous()
    assert equal_to_rounding(out, expected(view(x).contiguous(), dropout_p, state))
    leaf = x.requires_grad_()
    (got,) = torch.autograd.grad(safe_kernels.dropout(leaf, dropout_p, rng_state=state), leaf, view(x.detach()))
    assert equal_to_rounding(got, expected(view(x.detach()).contiguous(), dropout_p, state))


def test_it_drops_what_lora_drops() -> None:
    """One rule for the bits, whichever op makes them."""
    x, eye, state = torch.ones(9, 33), torch.eye(33), rng_state(5)
    by_lora = safe_kernels.lora(x, torch.zeros(9, 33), eye, eye, 1.0, dropout_p=0.4, rng_state=state)
    assert torch.equal(safe_kernels.dropout(x, 0.4, rng_state=state), by_lora)
    assert torch.equal(safe_kernels.activation(x, "relu", dropout_p=0.4, rng_state=state), by_lora)


def test_the_state_comes_from_torchs_generator() -> None:
    x = normal(9, 33)
    torch.manual_seed(7)
    first, second = safe_kernels.dropout(x, 0.5), safe_kernels.dropout(x, 0.5)
    torch.manual_seed(7)
    state = functional.draw_rng_state(x.device)
    assert torch.equal(safe_kernels.dropout(x, 0.5, rng_state=state), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
def test_the_seed_alone_is_retained(dropout_p: float) -> None:
    x = normal(9, 33).requires_grad_()
    retained = measure(lambda: safe_kernels.dropout(x, dropout_p))
    assert retained.bytes == (16 if dropout_p else 0)
    retained.output.sum().backward()
    stock = measure(lambda: nn.Dropout(0.5)(x))
    assert stock.bytes == x.nbytes, "a mask, on a CPU of floats"


def test_no_node_when_nothing_requires_grad() -> None:
    assert safe_kernels.dropout(normal(3, 4), 0.5).grad_fn is None
    with torch.no_grad():
        assert safe_kernels.dropout(normal(3, 4).requires_grad_(), 0.5).grad_fn is None


def test_x_may_be_changed_afterwards() -> None:
    source, state = normal(9, 33).requires_grad_(), rng_state(0)
    x = source * 1.0
    out = safe_kernels.dropout(x, 0.5, rng_state=state)
    x.zero_()
    out.sum().backward()
    assert equal_to_rounding(source.grad, expected(torch.ones(9, 33), 0.5, state))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_derivatives_of_any_order(dropout_p: float) -> None:
    x, state = normal(3, 7, dtype=torch.float64).requires_grad_(), rng_state(4)

    def call(x: Tensor) -> Tensor:
        return safe_kernels.dropout(x, dropout_p, rng_state=state)

    assert gradcheck(call, (x,))
    assert gradgradcheck(call, (x,))
    value = call(x).pow(4).sum()
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.sum()
    factor = torch.ones_like(x) if dropout_p == 0 else factor_of(x, dropout_p, state)
    torch.testing.assert_close(grad, 24 * x * factor**4)


def test_forward_mode_is_refused() -> None:
    x = normal(3, 4)
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(lambda x: safe_kernels.dropout(x, 0.5), (x,), (x,))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    x = normal(9, 33).requires_grad_()

    def gradient(run) -> Tensor:
        torch.manual_seed(3)
        x.grad = None
        run(x).square().sum().backward()
        return x.grad

    def block(x: Tensor) -> Tensor:
        return safe_kernels.dropout(x.sin(), 0.4).cos()

    assert torch.equal(gradient(lambda x: checkpoint(block, x, use_reentrant=use_reentrant)), gradient(block))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_two_threads(dtype: torch.dtype) -> None:
    x, state = normal(301, 130, dtype=dtype), rng_state(3)
    one = safe_kernels.dropout(x, 0.1, rng_state=state)
    torch.set_num_threads(2)
    assert torch.equal(safe_kernels.dropout(x, 0.1, rng_state=state), one)


# ---------------------------------------------------------------- PyTorch's tools


@pytest.mark.parametrize(("dropout_p", "requires_grad"), [(0.0, True), (0.2, False), (0.2, True)])
def test_opcheck(dropout_p: float, requires_grad: bool) -> None:
    x = normal(3, 5, 9).requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.safe_kernels.dropout.default, (x, dropout_p, rng_state(0)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_fake_tensors_have_the_real_ones_metadata(dropout_p: float) -> None:
    x, state = normal(3, 5, 9).transpose(0, 1), rng_state(0)
    real = torch.ops.safe_kernels.dropout(x, dropout_p, state)
    with FakeTensorMode() as mode:
        fake = torch.ops.safe_kernels.dropout(mode.from_tensor(x), dropout_p, mode.from_tensor(state))
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    x = normal(9, 33).requires_grad_()
    state = rng_state(0)
    compiled = torch.compile(safe_kernels.dropout, fullgraph=True, backend="aot_eager")
    got, plain = compiled(x * 2, 0.3, rng_state=state), safe_kernels.dropout(x * 2, 0.3, rng_state=state)
    assert torch.equal(got, plain)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])
    assert not torch.equal(compiled(x, 0.3), compiled(x, 0.3)), "drawn anew each call"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ["x", "float32", "Long"]),
        ({"x": torch.ones(2, 3, dtype=torch.bool)}, TypeError, ["x", "float32", "Bool"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "dimension"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "[0, 1]", "1.5"]),
        ({"dropout_p": float("nan")}, ValueError, ["dropout_p"]),
        ({"rng_state": torch.ones(3, dtype=torch.int64)}, ValueError, ["rng_state", "[2]", "[3]"]),
        ({"rng_state": torch.ones(2)}, TypeError, ["rng_state", "int64"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_message_says_what_is_wrong(changes: dict, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as error:
        safe_kernels.dropout(**{"x": torch.ones(2, 3), "dropout_p": 0.5, **changes})
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), str(error.value)
