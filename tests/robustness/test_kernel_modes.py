"""Grad modes nested in any way, parts of a gradient, copies and pickles of outputs: as with PyTorch's own ops."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surroundings import CASES
from torch import Tensor

import safe_kernels

every_op = pytest.mark.parametrize("name", list(CASES))

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "no inference": lambda: torch.inference_mode(False),
}
SAVED = "Inference tensors cannot be saved for backward"


def inside(modes: list[str], call: Callable[[], Tensor]) -> Tensor:
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(MODES[mode]())
        return call()


@every_op
@given(st.data())
def test_modes_nested_in_any_way_do_what_they_do_to_pytorchs_ops(name: str, data: Any) -> None:
    case = CASES[name]
    nesting = st.lists(st.sampled_from(sorted(MODES)), max_size=3)
    trains = data.draw(st.lists(st.booleans(), min_size=len(case.shapes), max_size=len(case.shapes)))
    made, called, later = data.draw(nesting), data.draw(nesting), data.draw(st.booleans())
    leaves = case.inputs(trains)
    inputs = [leaf if leaf.requires_grad else inside(made, leaf.clone) for leaf in leaves]
    expected = inside(called, lambda: case.op(*[tensor.detach() for tensor in leaves]))
    try:
        out = inside(called, lambda: case.op(*inputs))
    except RuntimeError as error:
        assert SAVED in str(error) and any(tensor.is_inference() for tensor in inputs)
        return
    stock = inside(called, lambda: case.stock(*leaves))
    assert (out.requires_grad, out.is_inference()) == (stock.requires_grad, stock.is_inference())
    assert torch.equal(out, expected)
    if not out.requires_grad:
        return
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    run = torch.no_grad if later else torch.enable_grad  # around the backward it makes no difference
    with run():
        got = torch.autograd.grad(out, wanted, torch.ones_like(out))
    torch.testing.assert_close(got, torch.autograd.grad(stock, wanted, torch.ones_like(out)))


@every_op
@given(st.data())
def test_any_part_of_the_gradient_may_be_asked_for(name: str, data: Any) -> None:
    case = CASES[name]
    leaves, same = case.inputs(True), case.inputs(True)
    wanted = data.draw(st.lists(st.sampled_from(range(len(leaves))), min_size=1, unique=True))
    case.op(*leaves).sin().sum().backward(inputs=[leaves[index] for index in wanted])
    case.stock(*same).sin().sum().backward(inputs=[same[index] for index in wanted])
    assert [leaf.grad is None for leaf in leaves] == [leaf.grad is None for leaf in same]
    torch.testing.assert_close([leaves[i].grad for i in wanted], [same[i].grad for i in wanted])


def saved_and_loaded(tensor: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    loaded: Tensor = torch.load(buffer)
    return loaded


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "torch.save": saved_and_loaded,
    "deepcopy of what is detached": lambda t: copy.deepcopy(t.detach()),
    "copy": copy.copy,
}


@every_op
@pytest.mark.parametrize("how", list(COPIES))
def test_an_output_can_be_copied_and_read_by_lora(name: str, how: str) -> None:
    case = CASES[name]
    out = case.op(*case.inputs(True))
    twin = COPIES[how](out)
    assert torch.equal(twin, out)
    A, B = (tensor.requires_grad_() for tensor in (torch.ones(2, out.shape[-1]).double(), torch.ones(3, 2).double()))
    base = torch.zeros(*out.shape[:-1], 3, dtype=torch.float64)
    got = torch.autograd.grad(safe_kernels.lora(twin, base, A, B, 1.0).sum(), (A, B))
    plain = out.detach().clone()
    torch.testing.assert_close(got, torch.autograd.grad(((plain @ A.mT) @ B.mT).sum(), (A, B)))


@every_op
def test_an_output_with_a_graph_is_no_more_deep_copied_than_pytorchs(name: str) -> None:
    case = CASES[name]
    for op in (case.op, case.stock):
        with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
            copy.deepcopy(op(*case.inputs(True)))


@every_op
def test_outputs_may_be_changed_in_place_and_the_change_has_its_gradient(name: str) -> None:
    case = CASES[name]
    results = []
    for op in (case.op, case.stock):
        leaves = case.inputs(True)
        out = op(*[leaf * 1.0 for leaf in leaves])
        try:
            out.mul_(2.0)[0].add_(leaves[0].sum())
            results.append(torch.autograd.grad(out.sin().sum(), leaves))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error) and name.endswith("norm") and op is case.op, (
                "a norm retains its output, which must not be changed"
            )
            return
    torch.testing.assert_close(*results)


@every_op
@given(st.data())
def test_views_of_one_tensor_may_be_several_arguments(name: str, data: Any) -> None:
    """Gate and up, gradient and output, weight and bias may overlap in memory: inputs are only read."""
    case = CASES[name]
    places = [data.draw(st.integers(0, 30)) for _ in case.shapes]
    results = []
    for op in (case.op, case.stock):
        pool = torch.linspace(-2, 2, 64, dtype=torch.float64).requires_grad_()
        inputs = [
            pool.as_strided(shape, torch.empty(shape).stride(), place)
            for shape, place in zip(case.shapes, places, strict=True)
        ]
        out = op(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), pool)))
    torch.testing.assert_close(*results)
