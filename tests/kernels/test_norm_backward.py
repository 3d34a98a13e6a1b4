"""Gradients of `rms_norm` and `layer_norm`: from the input and from the output, which are made, what is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from norm_cases import CASES, subsets
from norms import KINDS, MIDDLE, SHAPES, Norm, assert_results, backward_op, norm, plain, results
from oracle import DTYPES, Dtypes, taking_turns
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

BOTH = ("rms", "layer")


CASES += [("layer", names) for names in subsets("x", "weight", "bias")]
CASES += [("layer-no-weight", names) for names in subsets("x", "bias")]
CASES += [("layer-no-bias", names) for names in subsets("x", "weight")]
CASES += [("layer-bare", ("x",)), ("rms-offset", ("x",)), ("rms-offset", ("x", "weight"))]


def gradients(p: Norm, names: tuple[str, ...], retain_output: bool) -> dict[str, torch.Tensor]:
    p.require(*names)
    out = p.call(retain_output)
    assert (out.grad_fn is not None) == out.requires_grad == bool(names), "a node exactly when something requires grad"
    if names:
        out.backward(p.grad)
    for name, tensor in p.inputs.items():
        assert (tensor.grad is not None) == (name in names), f"grad of {name}"
    return {"out": out.detach(), **{name: p.inputs[name].grad for name in names}}


@pytest.mark.parametrize(
    ("kind", "shape", "dtypes", "retain_output"), taking_turns(KINDS, SHAPES, DTYPES, (True, False)), ids=str
)
def test_the_inputs_gradient(kind: str, shape: tuple[int, int], dtypes: Dtypes, retain_output: bool) -> None:
    p = norm(kind, shape, dtypes)
    assert_results(p, gradients(p, ("x",), retain_output))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_gradients(kind: str, shape: tuple[int, int], dtypes: Dtypes) -> None:
    p = norm(kind, shape, dtypes)
    got = results(p, p.apply)
    assert_results(p, got)
    assert torch.equal(p.call(), got["out"]), "the same without a graph"


@pytest.mark.parametrize("retain_output", [True, False])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize(("kind", "names"), CASES, ids=str)
def test_every_subset_of_requires_grad(kind: str, names: tuple[str, ...], dtypes: Dtypes, retain_output: bool) -> None:
    p = norm(kind, dtypes=dtypes)
    assert_results(p, gradients(p, names, retain_output))


@pytest.mark.parametrize("mask", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("from_output", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_every_output_mask_of_the_op(kind: str, from_output: bool, mask: tuple[bool, ...]) -> None:
    p = norm(kind)
    got = backward_op(p, from_output, list(mask))
    wanted = dict(zip(("x", "weight", "bias"), mask, strict=True))
    assert all(grad.shape == (0,) for name, grad in got.items() if not wanted[name])
    assert_results(p, {name: grad for name, grad in got.items() if wanted[name]})


@pytest.mark.parametrize("retain_output", [True, False])
@pytest.mark.parametrize("leading", [(), (2, 3, 4), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_any_leading_dimensions(kind: str, leading: tuple[int, ...], retain_output: bool) -> None:
    p = norm(kind, (*leading, 33))
    assert_results(p, gradients(p, ("x",), retain_output))


@pytest.mark.parametrize("retain_output", [True, False])
@pytest.mark.parametrize("kind", BOTH)
def test_x_and_gradient_of_any_strides(kind: str, retain_output: bool) -> None:
    strided = [torch.randn(33, 37).t(), torch.randn(37, 66)[:, ::2], torch.ones(1, 1).expand(37, 33)]
    for x, grad in zip(strided, reversed(strided), strict=True):
        p = norm(kind)
        p.x, p.grad = x.detach(), grad.detach()
        p.require("x")
        (got,) = torch.autograd.grad(p.call(retain_output), p.x, p.grad)
        assert got.is_contiguous()
        if x.stride() != (0, 0):  # no gradient of a constant row but rounding, times 1 / sqrt(eps)
            assert_results(p, {"x": got})


@pytest.mark.parametrize("names", [("x",), ("x", "weight", "bias")], ids=str)
@pytest.mark.parametrize("kind", ["rms", "rms-offset", "layer"])
@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (2, 17)], ids=str)
def test_gradcheck(kind: str, names: tuple[str, ...], shape: tuple[int, int]) -> None:
    p = norm(kind, shape, DTYPES[1])
    p.require(*names)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return p.apply(**dict(zip(p.inputs, tensors, strict=True)))

    assert gradcheck(call, tuple(p.inputs.values()))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]], ids=str)
def test_same_bits_twice_and_on_two_threads(kind: str, dtypes: Dtypes) -> None:
    p = norm(kind, (2500, 100), dtypes)
    first, second = results(p, p.apply), results(p, p.apply)
    torch.set_num_threads(2)
    third = results(p, p.apply)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} on one thread"
        assert torch.equal(tensor, third[name]), f"{name} on two threads"


@pytest.mark.parametrize("kind", BOTH)
def test_one_graph_backward_twice(kind: str) -> None:
    p = norm(kind).require("x")
    out = p.call()
    first, second = (torch.autograd.grad(out, p.x, p.grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(out, p.x, p.grad)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(out, p.x, p.grad)


@pytest.mark.parametrize("names", [("x",), ("x", "weight")], ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_double_backward_is_refused(kind: str, names: tuple[str, ...]) -> None:
    p = norm(kind).require(*names)
    leaves = [p.inputs[name] for name in names]
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*Binding\.detach"):
        (grad, *_) = torch.autograd.grad(p.call().square().sum(), leaves, create_graph=True)
        torch.autograd.grad(grad.square().sum(), leaves)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
@pytest.mark.parametrize("kind", BOTH)
def test_activation_checkpointing_changes_nothing(kind: str, use_reentrant: bool) -> None:
    p = norm(kind).require("x")
    weight = torch.randn(33, 33)

    def block(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(p.apply(**{**p.inputs, "x": x}) @ weight)

    (expected,) = torch.autograd.grad(block(p.x).sum(), p.x)
    checkpoint(block, p.x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(p.x.grad, expected)


def test_outputs_saved_to_the_cpu_come_back() -> None:
    p = norm("layer").require("x")
    with torch.autograd.graph.save_on_cpu():
        out = p.call()
    out.backward(p.grad)
    assert_results(p, {"x": p.x.grad})


@pytest.mark.parametrize("special", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", BOTH)
def test_special_numbers_go_where_pytorch_sends_them(kind: str, special: float) -> None:
    p = norm(kind)
    p.grad[4, 3] = special
    got, incumbent = results(p, p.apply), plain(p)
    for name in ("x", "weight"):
        assert torch.equal(torch.isfinite(got[name]), torch.isfinite(incumbent[name])), f"grad of {name}"
    p.require("x")
    (grad_x,) = torch.autograd.grad(p.call(), p.x, p.grad)
    assert torch.equal(torch.isfinite(grad_x), torch.isfinite(incumbent["x"]))


@pytest.mark.parametrize("kind", BOTH)
def test_no_features(kind: str) -> None:
    p = norm(kind, (3, 0)).require("x", "weight")
    p.call().sum().backward()
    assert (p.x.grad.shape, p.weight.grad.shape) == ((3, 0), (0,))


def test_empty_batches_give_zero_gradients() -> None:
    p = norm("layer", (0, MIDDLE[1])).require("x", "weight", "bias")
    p.call().sum().backward()
    assert not p.weight.grad.any()
    assert not p.bias.grad.any()
    assert p.weight.grad.shape == p.bias.grad.shape == (MIDDLE[1],)
