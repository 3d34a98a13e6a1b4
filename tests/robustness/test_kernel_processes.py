"""Forked children, threads of Python and of autograd, and an interpreter that ends: no hang, and the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import forks
import pytest
import torch
from surroundings import CASES
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import safe_kernels

every_op = pytest.mark.parametrize("name", list(CASES))
PATIENCE = 60  # seconds after which what hangs is killed


def big_problem() -> tuple[Tensor, ...]:
    """Rows enough for several threads to share."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(1000, 64), (1000, 48), (8, 64), (48, 8)]
    return tuple(torch.randn(size, generator=generator).requires_grad_() for size in sizes)


def forward_and_backward(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    x, *others = inputs
    hidden = safe_kernels.activation(safe_kernels.layer_norm(x, None, None, 1e-5), "gelu")
    out = safe_kernels.lora(hidden, *others, 2.0)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), inputs)]


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- processes


def fork_after_threads() -> None:
    torch.set_num_threads(2)
    inputs = big_problem()
    expected = forward_and_backward(inputs)
    if (pid := os.fork()) == 0:
        torch.set_num_threads(1)
        os._exit(0 if same(forward_and_backward(inputs), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_computes_the_same_after_several_threads_did() -> None:
    """GNU's OpenMP has lost its threads in the child, so that, as for PyTorch's own ops, it has to do with one."""
    done = forks.call(fork_after_threads, seconds=PATIENCE)
    assert done.code == 0, done.error


class Rows(Dataset[list[Tensor]]):
    """A data set that runs the ops in its workers."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[Tensor]:
        return forward_and_backward(big_problem())


def load_after_threads() -> None:
    torch.set_num_threads(2)
    expected = forward_and_backward(big_problem())
    loader = DataLoader(Rows(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=PATIENCE)
    results = list(loader)
    assert len(results) == 2 and all(same(result, expected) for result in results)


def test_workers_of_a_data_loader_compute_the_same_after_several_threads_did() -> None:
    done = forks.call(load_after_threads, seconds=PATIENCE)
    assert done.code == 0, done.error


PROGRAM = """
import torch, safe_kernels
gate = torch.randn(50, 8, requires_grad=True)
A, B = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
x = safe_kernels.activation(safe_kernels.layer_norm(gate, None, None, 1e-5), "silu", dropout_p=0.5)
out, failing = (safe_kernels.lora(x, torch.zeros(50, 4), A, B, 1.0, dropout_p=0.5) for _ in range(2))
cycle = [gate, x, out]
cycle.append(cycle)
failing.register_hook(lambda grad: 1 / 0)
try:
    failing.sum().backward()
except ZeroDivisionError as error:
    kept = error
"""


def test_an_interpreter_ends_in_peace_with_live_graphs_and_one_whose_backward_failed() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- threads


def in_another_thread(call: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@every_op
def test_backward_in_a_thread_other_than_forwards(name: str) -> None:
    case = CASES[name]
    here, there = case.inputs(True), case.inputs(True)
    case.op(*here).sin().sum().backward()
    losses: list[Tensor] = []
    in_another_thread(lambda: losses.append(case.op(*there).sin().sum()))
    in_another_thread(losses[0].backward)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(here, there, strict=True))


@every_op
def test_backwards_of_many_threads_at_once_add_up(name: str) -> None:
    """Integers, so that the order in which they are added changes nothing."""
    case = CASES[name]
    shared = case.inputs(True)
    graphs = [case.op(*shared) for _ in range(24)]
    once = torch.autograd.grad(graphs[0].sum(), shared, retain_graph=True)
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait(PATIENCE)
        for graph in graphs[index::8]:
            graph.sum().backward()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    torch.testing.assert_close([leaf.grad for leaf in shared], [24 * grad for grad in once], rtol=1e-12, atol=1e-12)


def test_one_graph_gone_back_through_by_many_threads_at_once() -> None:
    inputs = big_problem()
    expected = forward_and_backward(inputs)[1:]
    x, *others = inputs
    hidden = safe_kernels.activation(safe_kernels.layer_norm(x, None, None, 1e-5), "gelu")
    loss = safe_kernels.lora(hidden, *others, 2.0).square().mean()

    def work(_: int) -> bool:
        return same(list(torch.autograd.grad(loss, inputs, retain_graph=True)), expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(24)))


def test_ops_do_not_mind_the_number_of_threads_changing_meanwhile() -> None:
    inputs = big_problem()
    expected = forward_and_backward(inputs)
    done = threading.Event()

    def change() -> None:
        counts = [1, 2, 3]
        while not done.is_set():
            torch.set_num_threads(counts[0])
            counts = counts[1:] + counts[:1]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert all(same(forward_and_backward(inputs), expected) for _ in range(20))
    finally:
        done.set()
        thread.join()


def test_an_exception_in_one_thread_leaves_the_others_alone() -> None:
    case = CASES["lora"]
    expected = torch.autograd.grad(case.op(*(leaves := case.inputs(True))).sum(), leaves)

    def work(index: int) -> bool:
        leaves = case.inputs(True)
        out = case.op(*leaves)
        if index % 2:
            out.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                out.sum().backward()
            return True
        return same(list(torch.autograd.grad(out.sum(), leaves)), list(expected))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
