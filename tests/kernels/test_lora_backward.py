"""Gradients of `lora`: values, which are made, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, assert_results, ours, plain, problem, shapes
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import safe_kernels

MIDDLE = Shape(37, 33, 20, 8)
SUBSETS = list(product([False, True], repeat=4))
NAMES = ("x", "base", "A", "B")


def check(p: Problem) -> None:
    assert_results(p, ours(p, safe_kernels.lora))


def subset_id(flags: tuple[bool, ...]) -> str:
    return "+".join(name for name, flag in zip(NAMES, flags, strict=True) if flag) or "none"


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_values(shape: Shape, dtypes: Dtypes) -> None:
    p = problem(shape, dtypes)
    got = ours(p, safe_kernels.lora)
    assert_results(p, got)
    assert torch.equal(p.call(safe_kernels.lora), got["out"]), "the same without a graph"


@pytest.mark.parametrize("dtypes", [d for d in DTYPES if d.x != torch.float64], ids=str)
def test_values_at_a_real_models_size(dtypes: Dtypes) -> None:
    check(problem(Shape(1024, 384, 1536, 8), dtypes, dropout_p=0.1))


@pytest.mark.parametrize("leading", [(), (1,), (2, 5), (2, 3, 4), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    check(problem(MIDDLE, leading=leading, dropout_p=0.1))


@pytest.mark.parametrize("scaling", [0.0, -1.5])
def test_scaling(scaling: float) -> None:
    check(problem(MIDDLE, scaling=scaling))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("flags", SUBSETS, ids=subset_id)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
def test_every_subset_of_requires_grad(flags: tuple[bool, ...], dropout_p: float, dtypes: Dtypes) -> None:
    p = problem(MIDDLE, dtypes, dropout_p=dropout_p).require(*flags)
    out = p.call(safe_kernels.lora)
    assert out.requires_grad == any(flags)
    assert (out.grad_fn is not None) == any(flags), "a node exactly when something requires grad"
    if any(flags):
        out.backward(p.grad)
    for name, flag, tensor in zip(NAMES, flags, p.inputs, strict=True):
        assert (tensor.grad is not None) == flag, f"grad of {name}"
    grads = {name: tensor.grad for name, tensor in zip(NAMES, p.inputs, strict=True) if tensor.grad is not None}
    assert_results(p, {"out": out.detach(), **grads})


def test_no_node_under_no_grad() -> None:
    p = problem(MIDDLE).require()
    with torch.no_grad():
        out = p.call(safe_kernels.lora)
    assert not out.requires_grad
    assert out.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(p.call(safe_kernels.lora), out)


def test_a_gradient_of_any_strides() -> None:
    p = problem(MIDDLE)
    for grad in (torch.ones(1, 1).expand(37, 20), p.grad.t().contiguous().t(), torch.randn(37, 40)[:, ::2]):
        p.grad = grad
        assert not grad.is_contiguous()
        check(p)


@pytest.mark.parametrize("argument", NAMES)
def test_inputs_of_any_strides(argument: str) -> None:
    p = problem(MIDDLE, dropout_p=0.1)
    tensor = getattr(p, argument)
    setattr(p, argument, tensor.t().contiguous().t())
    check(p)
    setattr(p, argument, tensor[:1].expand(tensor.shape))
    check(p)


def test_rank_zero() -> None:
    p = problem(MIDDLE)
    x, A, B = p.x.requires_grad_(), p.A[:0].requires_grad_(), p.B[:, :0].requires_grad_()
    safe_kernels.lora(x, p.base, A, B, 2.0).sum().backward()
    assert not x.grad.any()
    assert (A.grad.shape, B.grad.shape) == (A.shape, B.shape)


def test_x_and_base_of_different_precision_as_under_autocast() -> None:
    p = problem(MIDDLE)
    p.base, p.grad = p.base.bfloat16(), p.grad.bfloat16()
    check(p)
    p.require(A=False, B=False)
    p.call(safe_kernels.lora).backward(p.grad)
    assert p.x.grad.dtype == torch.float32


def test_gradients_accumulate() -> None:
    p = problem(MIDDLE).require()
    p.call(safe_kernels.lora).backward(p.grad)
    once = [tensor.grad.clone() for tensor in p.inputs]
    p.call(safe_kernels.lora).backward(p.grad)
    for tensor, grad in zip(p.inputs, once, strict=True):
        assert torch.allclose(tensor.grad, 2 * grad)


def test_one_graph_backward_twice() -> None:
    p = problem(MIDDLE, dropout_p=0.1).require()
    out = p.call(safe_kernels.lora)
    first = torch.autograd.grad(out, p.inputs, p.grad, retain_graph=True)
    second = torch.autograd.grad(out, p.inputs, p.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(out, p.inputs, p.grad)


def test_gradients_do_not_share_memory() -> None:
    p = problem(MIDDLE).require()
    out = p.call(safe_kernels.lora)
    grads = torch.autograd.grad(out, p.inputs, p.grad)
    adapters = [grads[0], grads[2], grads[3], p.grad]
    pointers = {tensor.untyped_storage().data_ptr() for tensor in adapters}
    assert len(pointers) == len(adapters)


def test_an_input_changed_after_forward_is_noticed() -> None:
    p = problem(MIDDLE).require(x=False)
    out = p.call(safe_kernels.lora)
    p.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(p.grad)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("op", ["lora", "lora_linear"])
def test_gradients_are_of_the_weights_that_forward_read(op: str, trains: bool) -> None:
    """As in PyTorch's linear layers, where `.data` is replaced between forward and backward."""
    x, weight, A, B = (torch.randn(shape) for shape in ((7, 6), (5, 6), (3, 6), (5, 3)))
    A.requires_grad_(trains)
    B.requires_grad_(trains)
    x.requires_grad_()

    def compute(fused: bool) -> list[torch.Tensor]:
        a, b, w = (t.detach().clone().requires_grad_(t.requires_grad) for t in (A, B, weight))
        if not fused:
            out = torch.nn.functional.linear(x, w) + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
        elif op == "lora":
            out = safe_kernels.lora(x, torch.nn.functional.linear(x, w), a, b, 1.0)
        else:
            out = safe_kernels.lora_linear(x, w, None, a, b, 1.0)
        for parameter in (a, b, w):
            parameter.data = parameter.data * 2
        return list(torch.autograd.grad(out.sin().sum(), [t for t in (x, a, b) if t.requires_grad]))

    torch.testing.assert_close(compute(fused=True), compute(fused=False))


def test_a_frozen_adapters_input_may_be_changed() -> None:
    p = problem(MIDDLE).require(A=False, B=False)
    source = p.x.detach().clone().requires_grad_()
    x = source * 1.0
    out = safe_kernels.lora(x, p.base, p.A, p.B, p.scaling)
    with torch.no_grad():
        x.add_(1)
    out.backward(p.grad)
    assert_results(p, {"x": source.grad})


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_same_bits_twice_and_on_two_threads(dtypes: Dtypes) -> None:
    p = problem(Shape(1000, 384, 384, 17), dtypes, dropout_p=0.1)
    first, second = ours(p, safe_kernels.lora), ours(p, safe_kernels.lora)
    torch.set_num_threads(2)
    third = ours(p, safe_kernels.lora)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), f"grad of {name} on one thread"
        assert torch.equal(first[name], third[name]), f"grad of {name} on two threads"


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(5, 4, 3, 2), Shape(2, 6, 7, 9)], ids=str)
@pytest.mark.parametrize("flags", SUBSETS[1:], ids=subset_id)
def test_gradcheck(flags: tuple[bool, ...], shape: Shape, dropout_p: float) -> None:
    p = problem(shape, DTYPES[1], dropout_p=dropout_p).require(*flags)

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return safe_kernels.lora(*inputs, p.scaling, dropout_p=p.dropout_p, rng_state=p.rng_state)

    assert gradcheck(call, p.inputs)


@pytest.mark.parametrize("wanted", ["x", "A", "B"])
def test_double_backward_is_refused(wanted: str) -> None:
    p = problem(MIDDLE).require()
    out = p.call(safe_kernels.lora)
    with pytest.raises(RuntimeError, match=r"twice|double|second|once_differentiable"):
        (grad,) = torch.autograd.grad(out.square().sum(), [getattr(p, wanted)], create_graph=True)
        torch.autograd.grad(grad.square().sum(), p.inputs, allow_unused=False)


def test_the_part_that_is_linear_may_be_differentiated_twice() -> None:
    """base goes through unchanged, so no kernel stands in its way."""
    p = problem(MIDDLE).require(x=False, A=False, B=False)
    (grad,) = torch.autograd.grad(p.call(safe_kernels.lora).pow(3).sum(), p.base, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), p.base)
    torch.testing.assert_close(second, 6 * p.call(safe_kernels.lora).detach())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_activation_checkpointing_changes_nothing(use_reentrant: bool, dropout_p: float) -> None:
    p = problem(MIDDLE).require()
    second = problem(Shape(37, 20, 33, 3), seed=1).require(x=False, base=False)

    def block(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(safe_kernels.lora(x, p.base, p.A, p.B, 2.0, dropout_p=dropout_p))
        return safe_kernels.lora(hidden, second.base, second.A, second.B, 0.5, dropout_p=dropout_p)

    def gradients(run) -> list[torch.Tensor]:
        torch.manual_seed(3)
        leaves = [p.x, p.A, p.B, second.A, second.B]
        for leaf in leaves:
            leaf.grad = None
        run(p.x).square().sum().backward()
        return [leaf.grad.clone() for leaf in leaves]

    expected = gradients(block)
    got = gradients(lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
def test_special_numbers_go_where_pytorch_sends_them(special: float) -> None:
    p = problem(MIDDLE)
    p.grad[4, 3] = special
    got, incumbent = ours(p, safe_kernels.lora), plain(p)
    for name in NAMES:
        expected = torch.isfinite(incumbent[name])
        assert torch.equal(torch.isfinite(got[name]), expected), f"grad of {name}"
