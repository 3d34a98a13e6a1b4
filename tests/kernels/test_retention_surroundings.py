"""The measure with other hooks, other threads and other kinds of tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from leaves import BYTES, D, N, leaf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from safe_kernels.retention import Retention, measure


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_inside(use_reentrant: bool) -> None:
    x = leaf()

    def block(x: Tensor) -> Tensor:
        return x.exp().sin().cos()

    plain = measure(lambda: block(x))
    assert plain.bytes == 2 * BYTES  # what exp and sin return
    retained = measure(lambda: checkpoint(block, x, use_reentrant=use_reentrant))
    assert retained.bytes == BYTES, "the input alone"
    (expected,) = torch.autograd.grad(plain.output.sum(), x)
    retained.output.sum().backward()
    assert torch.allclose(x.grad, expected)


def test_inside_checkpointing() -> None:
    x = leaf()
    seen = []

    def block(x: Tensor) -> Tensor:
        retained = measure(lambda: x.exp().sin())
        seen.append(retained.bytes)
        return retained.output

    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert torch.allclose(x.grad, x.exp() * x.exp().cos())
    assert seen[0] == BYTES


def test_other_hooks_inside_and_outside() -> None:
    x = leaf()

    def forward() -> Tensor:
        with save_on_cpu():
            hidden = x.exp()
        return hidden.sin()

    outside: list[Tensor] = []
    with saved_tensors_hooks(lambda t: outside.append(t) or t, lambda t: t):
        retained = measure(forward)
        after = retained.output.cos()
    assert retained.bytes == BYTES  # exp's output is sin's input, which is ours
    assert len(outside) == 1, "hooks outside are in force again afterwards"
    after.sum().backward()


def test_nested_measures() -> None:
    x = leaf()
    inner: list[Retention] = []

    def forward() -> Tensor:
        inner.append(measure(lambda: x.exp()))
        return inner[0].output.sin()

    outer = measure(forward)
    assert inner[0].bytes == BYTES
    assert outer.bytes == BYTES
    outer.output.sum().backward()


def test_hooks_are_removed_when_the_function_fails() -> None:
    x = leaf()
    with pytest.raises(ZeroDivisionError):
        measure(lambda: x.exp() / (1 // 0))
    before = torch._C._autograd._top_saved_tensors_default_hooks(False)
    assert before is None


def test_threads_do_not_see_each_other() -> None:
    barrier = threading.Barrier(4)
    results: dict[int, int] = {}

    def work(size: int) -> None:
        x = leaf(size, size)
        barrier.wait()

        def forward() -> list[Tensor]:
            return [x.exp() for _ in range(30)]

        results[size] = measure(forward).bytes

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 5, 7, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {size: 30 * size * size * 4 for size in (3, 5, 7, 9)}


def test_meta_and_fake_tensors() -> None:
    x = torch.randn(N, D, device="meta", requires_grad=True)
    assert measure(lambda: (x * 2).exp()).bytes == BYTES
    with FakeTensorMode():
        weight = nn.Parameter(torch.randn(D, D))
        y = torch.randn(N, D, requires_grad=True)
        assert measure(lambda: (y @ weight).exp(), exclude=weight).bytes == 2 * BYTES


def test_subclasses_count_by_their_parts() -> None:
    x = TwoTensor(torch.randn(N, D), torch.randn(N, D)).requires_grad_()
    assert measure(lambda: x.exp()).bytes == 2 * BYTES
    parameter = nn.Parameter(TwoTensor(torch.randn(N, D), torch.randn(N, D)))
    assert measure(lambda: parameter * parameter, exclude=parameter).bytes == 0


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_count_by_their_parts() -> None:
    indices = torch.tensor([[0, 2], [1, 3]])
    sparse = torch.sparse_coo_tensor(indices, torch.ones(2), (4, 4)).coalesce()
    dense = leaf(4, 3)
    retained = measure(lambda: torch.sparse.mm(sparse, dense))
    assert retained.bytes in (2 * 4 + 4 * 8, 2 * 4 + 4 * 8 + 4 * 3 * 4)
    csr = sparse.to_sparse_csr()
    assert measure(lambda: csr @ dense).bytes >= 2 * 4


def test_lazy_modules_may_be_excluded() -> None:
    lazy = nn.LazyLinear(3)
    x = leaf()
    assert measure(lambda: x.exp(), exclude=lazy).bytes == BYTES
    assert lazy.has_uninitialized_params()
    assert measure(lambda: lazy(x), exclude=lazy).bytes == BYTES, "its parameters are made inside"


def test_compiled_functions_are_seen() -> None:
    x = leaf()
    compiled = torch.compile(lambda x: (x * 2).exp(), backend="aot_eager", fullgraph=True)
    compiled(x)
    retained = measure(lambda: compiled(x))
    assert retained.bytes == BYTES
    retained.output.sum().backward()


def test_a_real_block() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = leaf(2, 5, 16)
    retained = measure(lambda: block(x), exclude=block)
    expected = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    got = torch.autograd.grad(retained.output.sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert retained.bytes == sum(tensor.bytes for tensor in retained.tensors)
