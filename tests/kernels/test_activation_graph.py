"""`activation` in a graph: what is retained, what is refused, and how PyTorch's tools see it."""

from __future__ import annotations

import pytest
import torch
from activations import DTYPES, KINDS, normal
from oracle import rng_state
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import safe_kernels
from safe_kernels.retention import measure

SHAPE = (3, 5, 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_pre_activation_is_retained_and_nothing_else(dropout_p: float, dtype: torch.dtype) -> None:
    x = normal(*SHAPE, dtype=dtype).requires_grad_()
    retained = measure(lambda: safe_kernels.activation(x, "gelu", dropout_p=dropout_p))
    assert retained.bytes == x.nbytes + (16 if dropout_p else 0), str(retained)
    retained.output.sum().backward()
    assert x.grad.shape == x.shape


def test_no_node_when_nothing_requires_grad() -> None:
    x = normal(*SHAPE)
    retained = measure(lambda: safe_kernels.activation(x, "gelu", dropout_p=0.1))
    assert retained.bytes == 0
    assert retained.output.grad_fn is None
    with torch.no_grad():
        assert safe_kernels.activation(x.requires_grad_(), "gelu").grad_fn is None
    with torch.inference_mode():
        assert not safe_kernels.activation(x, "gelu").requires_grad


def test_the_pre_activation_changed_after_forward_is_noticed() -> None:
    source = normal(*SHAPE).requires_grad_()
    x = source * 1.0
    out = safe_kernels.activation(x, "silu")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_one_graph_backward_twice() -> None:
    x = normal(*SHAPE).requires_grad_()
    out = safe_kernels.activation(x, "silu", dropout_p=0.3)
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], first)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind: str) -> None:
    x = normal(*SHAPE).requires_grad_()
    (grad,) = torch.autograd.grad(safe_kernels.activation(x, kind).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"activation cannot be differentiated twice.*Binding\.detach"):
        torch.autograd.grad(grad.sum(), x)


def test_forward_mode_is_refused() -> None:
    x = normal(*SHAPE)
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(lambda x: safe_kernels.activation(x, "gelu"), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    x = normal(*SHAPE).requires_grad_()

    def gradient(run) -> Tensor:
        torch.manual_seed(3)
        x.grad = None
        run(x).square().sum().backward()
        return x.grad

    def block(x: Tensor) -> Tensor:
        return safe_kernels.activation(x.sin(), "gelu", dropout_p=0.2).cos()

    expected = gradient(block)
    assert torch.equal(gradient(lambda x: checkpoint(block, x, use_reentrant=use_reentrant)), expected)


# ---------------------------------------------------------------- PyTorch's tools


@pytest.mark.parametrize(("dropout_p", "requires_grad"), [(0.0, False), (0.2, True)])
def test_opcheck(dropout_p: float, requires_grad: bool) -> None:
    x, state = normal(*SHAPE).requires_grad_(requires_grad), rng_state(0)
    torch.library.opcheck(torch.ops.safe_kernels.activation.default, (x, "gelu", dropout_p, state))


def test_opcheck_backward() -> None:
    x, grad = normal(*SHAPE), normal(*SHAPE, seed=1)
    arguments = (grad, x, "gelu", 0.2, rng_state(0))
    torch.library.opcheck(torch.ops.safe_kernels.activation_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_have_the_real_ones_metadata(dtype: torch.dtype) -> None:
    x = normal(*SHAPE, dtype=dtype).transpose(0, 1)

    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        ops = torch.ops.safe_kernels
        return ops.activation(x, "silu"), ops.activation_backward(x, x, "silu", 0.0, None)

    with FakeTensorMode() as mode:
        fakes = results(mode.from_tensor(x))
    for real, fake in zip(results(x), fakes, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiled_whole(dropout_p: float) -> None:
    torch._dynamo.reset()
    x, state = normal(*SHAPE).requires_grad_(), rng_state(0)

    def run(x: Tensor) -> Tensor:
        return safe_kernels.activation(x * 2, "gelu_tanh", dropout_p=dropout_p, rng_state=state).square()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), run(x))
    grads = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, run)]
    torch.testing.assert_close(*grads)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"kind": "swish"}, ValueError, ["kind", "'silu', 'gelu', 'gelu_tanh', 'relu'", "'swish'"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "dimension"]),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ["x", "float32", "Long"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "[0, 1]", "1.5"]),
        ({"dropout_p": 0.5, "rng_state": torch.ones(3, dtype=torch.int64)}, ValueError, ["rng_state", "[2]", "[3]"]),
        ({"dropout_p": 0.5, "rng_state": torch.ones(2)}, TypeError, ["rng_state", "int64"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_message_says_what_is_wrong(changes: dict, kind: type[Exception], words: list[str]) -> None:
    for requires_grad in (False, True):
        arguments = {"x": torch.ones(2, 3, requires_grad=requires_grad), "kind": "silu", **changes}
        with pytest.raises(kind) as error:
            safe_kernels.activation(**arguments)
        assert type(error.value) is kind
        assert all(word in str(error.value) for word in words), str(error.value)


def test_the_op_itself_refuses() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"rng_state.*None"):
        torch.ops.safe_kernels.activation(x, "silu", 0.5)
    with pytest.raises(ValueError, match=r"grad must .* of x, \[2, 3\], got \[2, 4\]"):
        torch.ops.safe_kernels.activation_backward(torch.ones(2, 4), x, "silu", 0.0, None)
    with pytest.raises(ValueError, match="kind"), torch.inference_mode():
        torch.ops.safe_kernels.activation(x.to("meta"), "tanh")


# ---------------------------------------------------------------- a ReLU keeps its output


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_relus_gradient_from_its_output_is_that_from_its_input(dtype: torch.dtype, dropout_p: float) -> None:
    x = normal(12, 33, dtype=dtype)
    x[0, :4] = torch.tensor([torch.nan, torch.inf, 0.0, -0.0])
    grad, state = normal(12, 33, dtype=dtype, seed=1), rng_state(5)
    grad[1, 0] = torch.inf
    leaf = x.clone().requires_grad_()
    out = safe_kernels.activation(leaf, "relu", dropout_p=dropout_p, rng_state=state)
    (got,) = torch.autograd.grad(out, leaf, grad)
    expected = torch.ops.safe_kernels.activation_backward(grad, x, "relu", dropout_p, state)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_relu_lets_its_input_be_written_to_and_not_its_output() -> None:
    source = normal(12, 33).requires_grad_()
    x = source * 1.0
    out = safe_kernels.activation(x, "relu")
    x.detach().add_(3)
    (got,) = torch.autograd.grad(out.sum(), source, retain_graph=True)
    assert torch.equal(got, (source > 0).float())
    out.detach().add_(3)
    with pytest.raises(RuntimeError, match=r"(?s)inplace operation.*ReLU its output.*clone"):
        torch.autograd.grad(out.sum(), source)
