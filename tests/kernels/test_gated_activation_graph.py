"""`gated_activation` in a graph: what is retained, what is refused, and how PyTorch's tools see it."""

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
SUBSETS = [(False, False), (True, False), (False, True), (True, True)]


def pair(*wanted: bool, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gate, up = (normal(*SHAPE, dtype=dtype, seed=seed) for seed in range(2))
    return gate.requires_grad_(wanted[0]), up.requires_grad_(wanted[1])


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_retained(dtype: torch.dtype, dropout_p: float, wanted: tuple[bool, bool]) -> None:
    gate, up = pair(*wanted, dtype=dtype)
    retained = measure(lambda: safe_kernels.gated_activation(gate, up, "silu", dropout_p=dropout_p))
    expected = 0
    if any(wanted):
        expected = gate.nbytes + (up.nbytes if wanted[0] else 0) + (16 if dropout_p else 0)
    assert retained.bytes == expected, str(retained)
    assert (retained.output.grad_fn is not None) == any(wanted)
    if any(wanted):
        retained.output.sum().backward()


def test_halves_of_one_tensor_are_retained_as_they_are() -> None:
    both = normal(4, 5, 18).requires_grad_()
    retained = measure(lambda: safe_kernels.gated_activation(*both.chunk(2, -1), "silu"))
    assert retained.bytes == both.nbytes
    assert len(retained.tensors) == 1
    (got,) = torch.autograd.grad(retained.output.sum(), both)
    gate, up = both.chunk(2, -1)
    (expected,) = torch.autograd.grad((torch.nn.functional.silu(gate) * up).sum(), both)
    torch.testing.assert_close(got, expected)


def test_stock_by_the_same_measure() -> None:
    """The incumbent, so that the contract is a comparison: act(gate) besides, and dropout's product and mask."""
    gate, up = pair(True, True)
    stock = measure(lambda: torch.nn.functional.silu(gate) * up)
    assert stock.bytes == 3 * gate.nbytes
    dropped = measure(lambda: torch.nn.functional.dropout(torch.nn.functional.silu(gate) * up, 0.1))
    assert dropped.bytes >= 4 * gate.nbytes


@pytest.mark.parametrize("argument", [0, 1])
def test_an_input_changed_after_forward_is_noticed(argument: int) -> None:
    inputs = [tensor * 1.0 for tensor in pair(True, True)]
    out = safe_kernels.gated_activation(*inputs, "silu")
    inputs[argument].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_up_may_change_when_gate_is_frozen() -> None:
    gate, source = pair(False, True)
    up = source * 1.0
    out = safe_kernels.gated_activation(gate, up, "silu")
    with torch.no_grad():
        up.add_(1)
    out.sum().backward()
    torch.testing.assert_close(source.grad, torch.nn.functional.silu(gate))


@pytest.mark.parametrize("wanted", SUBSETS[1:], ids=str)
def test_second_derivatives_are_refused(wanted: tuple[bool, bool]) -> None:
    inputs = pair(*wanted)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    out = safe_kernels.gated_activation(*inputs, "silu")
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gated_activation cannot be differentiated twice.*Binding\.detach"):
        torch.autograd.grad(sum(grad.sum() for grad in grads), leaves)


def test_forward_mode_is_refused() -> None:
    gate, up = pair(False, False)
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(lambda up: safe_kernels.gated_activation(gate, up, "gelu"), (up,), (up,))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    leaves = pair(True, True)

    def gradients(run) -> list[Tensor]:
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        run(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    def block(gate: Tensor, up: Tensor) -> Tensor:
        return safe_kernels.gated_activation(gate.sin(), up.cos(), "gelu", dropout_p=0.2).cos()

    expected = gradients(block)
    got = gradients(lambda *inputs: checkpoint(block, *inputs, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- PyTorch's tools


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
def test_opcheck(wanted: tuple[bool, bool]) -> None:
    arguments = (*pair(*wanted), "gelu", 0.2 if wanted[0] else 0.0, rng_state(0))
    torch.library.opcheck(torch.ops.safe_kernels.gated_activation.default, arguments)


@pytest.mark.parametrize("mask", SUBSETS[2:], ids=str)
def test_opcheck_backward(mask: tuple[bool, bool]) -> None:
    arguments = (normal(*SHAPE, seed=2), *pair(False, False), "silu", 0.2, rng_state(0), list(mask))
    torch.library.opcheck(torch.ops.safe_kernels.gated_activation_backward.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_have_the_real_ones_metadata(dtype: torch.dtype) -> None:
    gate, up = (tensor.transpose(0, 1) for tensor in pair(False, False, dtype=dtype))

    def results(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops.safe_kernels
        grads = [ops.gated_activation_backward(up, gate, up, "gelu", 0.0, None, list(mask)) for mask in SUBSETS]
        return ops.gated_activation(gate, up, "gelu"), *(grad for pair in grads for grad in pair)

    with FakeTensorMode() as mode:
        fakes = results(mode.from_tensor(gate), mode.from_tensor(up))
    for real, fake in zip(results(gate, up), fakes, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiled_whole(dropout_p: float) -> None:
    torch._dynamo.reset()
    leaves, state = pair(True, True), rng_state(0)

    def run(gate: Tensor, up: Tensor) -> Tensor:
        out = safe_kernels.gated_activation(gate * 2, up, "gelu_tanh", dropout_p=dropout_p, rng_state=state)
        return out.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), run(*leaves))
    got, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, run))
    torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"kind": "swiglu"}, ValueError, ["kind", "'silu', 'gelu', 'gelu_tanh', 'relu'", "'swiglu'"]),
        ({"gate": torch.tensor(1.0)}, ValueError, ["gate", "dimension"]),
        ({"up": torch.ones(1, 3)}, ValueError, ["up", "[1, 3]", "gate", "[2, 3]", "expand"]),
        ({"up": torch.ones(2, 3).bfloat16()}, TypeError, ["up", "gate", "BFloat16", "Float"]),
        ({"gate": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ["gate", "float32", "Long"]),
        ({"up": torch.ones(2, 3, device="meta")}, ValueError, ["up", "meta", "gate", "cpu"]),
        ({"dropout_p": -0.5}, ValueError, ["dropout_p", "[0, 1]", "-0.5"]),
        ({"dropout_p": 0.5, "rng_state": torch.ones(2)}, TypeError, ["rng_state", "int64"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_message_says_what_is_wrong(changes: dict, kind: type[Exception], words: list[str]) -> None:
    arguments = {"gate": torch.ones(2, 3), "up": torch.ones(2, 3), "kind": "silu", **changes}
    with pytest.raises(kind) as error:
        safe_kernels.gated_activation(**arguments)
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_of_another_shape_is_refused(kind: str) -> None:
    gate, up = pair(False, False)
    with pytest.raises(ValueError, match="grad"):
        torch.ops.safe_kernels.gated_activation_backward(gate[:1], gate, up, kind, 0.0, None, [True, True])
