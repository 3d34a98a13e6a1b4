"""What goes wrong in the middle of an op comes out, and leaves nothing behind: hooks that raise, Ctrl-C, edits."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from failing import Boom, boom, interrupt
from hypothesis import given
from hypothesis import strategies as st
from surroundings import CASES, Case
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks

every_op = pytest.mark.parametrize("name", list(CASES))


Raise = Callable[..., None]
Run = Callable[[Case, list[Tensor], Raise], None]


def all_gone(storages: list[StorageWeakRef]) -> bool:
    if not all(storage.expired() for storage in storages):
        gc.collect()  # an exception's traceback and what it holds may be a cycle
    return all(storage.expired() for storage in storages)


def gradients(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(case.op(*inputs).sin().sum(), inputs))


def in_pack(case: Case, inputs: list[Tensor], fail: Raise) -> None:
    with saved_tensors_hooks(lambda t: fail() or t, lambda t: t):
        case.op(*inputs)


def in_unpack(case: Case, inputs: list[Tensor], fail: Raise) -> None:
    with saved_tensors_hooks(lambda t: t, lambda t: fail() or t):
        out = case.op(*inputs)
    out.sum().backward()


def at_the_output(case: Case, inputs: list[Tensor], fail: Raise) -> None:
    out = case.op(*inputs)
    out.register_hook(fail)
    out.sum().backward()


def before_the_node(case: Case, inputs: list[Tensor], fail: Raise) -> None:
    out = case.op(*inputs)
    assert out.grad_fn is not None
    out.grad_fn.register_prehook(fail)
    out.sum().backward()


def after_the_node(case: Case, inputs: list[Tensor], fail: Raise) -> None:
    out = case.op(*inputs)
    assert out.grad_fn is not None
    out.grad_fn.register_hook(fail)
    out.sum().backward()


def at_an_input(case: Case, inputs: list[Tensor], fail: Raise) -> None:
    inputs[-1].register_hook(fail)
    case.op(*inputs).sum().backward()


@every_op
@pytest.mark.parametrize("fail", [boom, interrupt])
@pytest.mark.parametrize("run", [in_pack, in_unpack, at_the_output, before_the_node, after_the_node, at_an_input])
def test_an_exception_in_the_middle_comes_out_and_leaves_nothing(name: str, run: Run, fail: Raise) -> None:
    case = CASES[name]
    leaves = case.inputs(True)
    expected = gradients(case, leaves)
    inputs = [leaf * 1.0 for leaf in leaves]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in inputs]
    with pytest.raises(Boom if fail is boom else KeyboardInterrupt):
        run(case, inputs, fail)
    del inputs
    assert all_gone(storages), "what the op retained"
    assert all(torch.equal(a, b) for a, b in zip(gradients(case, leaves), expected, strict=True))


def test_a_graph_whose_backward_failed_may_be_gone_back_through_once_more() -> None:
    for case in CASES.values():
        leaves, fails = case.inputs(True), [True]

        def hook(grad: Tensor, fails: list[bool] = fails) -> None:
            if fails.pop() if fails else False:
                raise Boom

        out = case.op(*leaves)
        out.register_hook(hook)
        with pytest.raises(Boom):
            torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        got, anew = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(case.op(*leaves).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, anew, strict=True))


@pytest.mark.parametrize("fail", [boom, interrupt])
def test_a_forward_that_is_interrupted_adds_nothing_to_the_statistics(fail: Raise) -> None:
    x, base, A, B = CASES["lora"].inputs(True)
    statistics = AdapterStatistics(blocks=RowBlocks.spread(6))
    with (
        pytest.raises((Boom, KeyboardInterrupt)),
        saved_tensors_hooks(lambda t: fail() or t, lambda t: t),
    ):
        safe_kernels.lora(x, base, A, B, 2.0, statistics=statistics)
    assert not statistics.sums.any()


# ---------------------------------------------------------------- edits in place


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda t: t.add_(1.0),
    "a view": lambda t: t.view(-1)[0].zero_(),
    "a detached alias": lambda t: t.detach().mul_(3.0),
    "resized": lambda t: t.resize_(0),
}


@every_op
@given(st.data())
def test_an_edit_between_forward_and_backward_is_noticed_or_does_no_harm(name: str, data: Any) -> None:
    case = CASES[name]
    trains = data.draw(st.lists(st.booleans(), min_size=len(case.shapes), max_size=len(case.shapes)).filter(any))
    leaves = case.inputs(trains)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    expected = torch.autograd.grad(case.stock(*leaves).sin().sum(), wanted)
    inputs = [leaf * 1.0 if leaf.requires_grad else leaf for leaf in leaves]
    out = case.op(*inputs)
    loss = out.sin().sum() if data.draw(st.booleans()) else out.clone().sin().sum()
    edited = data.draw(st.sampled_from([*inputs, out]))
    edit = data.draw(st.sampled_from(sorted(EDITS)))
    with torch.no_grad():
        if edit != "resized" or not edited.requires_grad:  # PyTorch does not resize what has a graph
            EDITS[edit](edited)
    try:
        got = torch.autograd.grad(loss, wanted)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(got, expected)


@every_op
def test_mutation_is_allowed_where_pytorch_allows_it(name: str) -> None:
    case = CASES[name]
    leaves = case.inputs(True)
    expected = gradients(case, leaves)
    with allow_mutation_on_saved_tensors():
        inputs = [leaf * 1.0 for leaf in leaves]
        loss = case.op(*inputs).sin().sum()
        with torch.no_grad():
            for tensor in inputs:
                tensor.zero_()
        got = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(list(got), expected)


# ---------------------------------------------------------------- what hooks hand back


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "a row less": lambda t: t[1:],
    "another width": lambda t: t[..., 1:],
    "nothing in it": lambda t: t.new_empty(0),
    "a scalar": lambda t: t.sum(),
    "integers": lambda t: t.int(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "None": lambda t: None,
    "strides of zero": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: t.mT if t.dim() == 2 else t.flip(0),
    "float32": lambda t: t.float() if t.is_floating_point() else t,
}


@every_op
@given(st.data())
def test_whatever_unpacking_returns_the_answer_is_a_gradient_or_an_error(name: str, data: Any) -> None:
    case = CASES[name]
    leaves = case.inputs(True)
    kind = data.draw(st.sampled_from(sorted(WRONG)))
    which = data.draw(st.integers(0, 7))
    unpacked = []

    def unpack(tensor: Tensor) -> Any:
        unpacked.append(tensor)
        return WRONG[kind](tensor) if len(unpacked) - 1 == which else tensor

    with saved_tensors_hooks(lambda t: t, unpack):
        loss = case.op(*leaves).sum()
    try:
        got = torch.autograd.grad(loss, leaves)
    except (RuntimeError, ValueError, TypeError) as error:
        assert str(error)
    else:
        assert [(grad.shape, grad.dtype) for grad in got] == [(leaf.shape, leaf.dtype) for leaf in leaves]


@contextlib.contextmanager
def early_stop(enabled: bool) -> Iterator[None]:
    with set_checkpoint_early_stop(enabled):
        yield


def checkpointed(case: Case, inputs: list[Tensor]) -> Tensor:
    return checkpoint(case.op, *inputs, use_reentrant=False)


def nested(case: Case, inputs: list[Tensor]) -> Tensor:
    return checkpoint(lambda *args: checkpointed(case, [arg * 1.0 for arg in args]), *inputs, use_reentrant=False)


def plainly(case: Case, inputs: list[Tensor]) -> Tensor:
    return case.op(*inputs)


@every_op
@pytest.mark.parametrize("run", [checkpointed, nested, plainly])
@pytest.mark.parametrize("around", [save_on_cpu, lambda: early_stop(True), lambda: early_stop(False)])
def test_hooks_that_keep_tensors_elsewhere_change_no_bit_and_let_go(
    name: str,
    run: Callable[[Case, list[Tensor]], Tensor],
    around: Callable[[], AbstractContextManager[Any]],
) -> None:
    case = CASES[name]
    leaves = case.inputs(True)
    expected = gradients(case, leaves)
    inputs = [leaf * 1.0 for leaf in leaves]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in inputs]
    with around():
        loss = run(case, inputs).sin().sum()
    got = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    del inputs, loss
    assert all_gone(storages)
