"""The retention contract, to the byte."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, problem
from torch import Tensor, nn

import safe_kernels
from safe_kernels.retention import measure

MIDDLE = Shape(37, 33, 20, 8)
RNG_BYTES = 16
SUBSETS = list(product([False, True], repeat=4))


def subset_id(flags: tuple[bool, ...]) -> str:
    return "+".join(name for name, flag in zip(("x", "base", "A", "B"), flags, strict=True) if flag) or "none"


def expected_bytes(x: Tensor, A: Tensor, flags: tuple[bool, ...], dropout_p: float, readers: int) -> int:
    """x if lora_A trains, once; x A' of each call if lora_B alone does; the random state where a mask is made again."""
    wants_x, _, wants_A, wants_B = flags
    rng = RNG_BYTES * readers if dropout_p > 0 and (wants_A or wants_x) else 0
    if wants_B and not wants_A:
        return readers * x.shape[0] * A.shape[0] * A.element_size() + rng
    return (x.untyped_storage().nbytes() if wants_A else 0) + rng


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[4]], ids=str)
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("flags", SUBSETS, ids=subset_id)
def test_every_subset_of_requires_grad(flags: tuple[bool, ...], dropout_p: float, readers: int, dtypes: Dtypes) -> None:
    shared = problem(MIDDLE, dtypes).require(*flags)
    adapters = [problem(MIDDLE, dtypes, seed=seed).require(*flags) for seed in range(readers)]
    parameters = [tensor for p in adapters for tensor in (p.A, p.B)]

    def forward() -> list[Tensor]:
        return [safe_kernels.lora(shared.x, p.base, p.A, p.B, 2.0, dropout_p=dropout_p) for p in adapters]

    retained = measure(forward, exclude=parameters)
    assert retained.bytes == expected_bytes(shared.x, shared.A, flags, dropout_p, readers), str(retained)
    assert all((out.grad_fn is not None) == any(flags) for out in retained.output)
    if any(flags):
        torch.stack(retained.output).sum().backward()


@pytest.mark.parametrize("has_graph", [False, True])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_under_autocast_readers_share_one_copy(dropout_p: float, readers: int, has_graph: bool) -> None:
    """Of an x that nothing else keeps; PEFT's layers each keep a copy of their own."""
    x = torch.randn(MIDDLE.rows, MIDDLE.d_in, requires_grad=has_graph)
    problems = [problem(MIDDLE, DTYPES[0], seed=seed).require(False, False, True, True) for seed in range(readers)]
    base = problems[0].base.bfloat16()

    def forward() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [safe_kernels.lora(x, base, p.A, p.B, 2.0, dropout_p=dropout_p) for p in problems]

    def stock(p: Problem) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return base + 2.0 * nn.functional.linear(nn.functional.linear(x, p.A), p.B)

    retained = measure(forward, exclude=[tensor for p in problems for tensor in (p.A, p.B)])
    rng = RNG_BYTES * readers if dropout_p else 0
    assert retained.bytes == 2 * x.numel() + rng, str(retained)
    if not dropout_p:
        for p, out in zip(problems, retained.output, strict=True):
            got = torch.autograd.grad(out.float().square().sum(), (p.A, p.B), retain_graph=True)
            for a, b in zip(got, torch.autograd.grad(stock(p).float().square().sum(), (p.A, p.B)), strict=True):
                assert (a - b).abs().max() <= 3e-2 * b.abs().max()


@pytest.mark.parametrize("has_graph", [False, True])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_readers_share_one_copy_in_the_dtype_of_narrower_adapters(
    wide: torch.dtype, narrow: torch.dtype, readers: int, has_graph: bool
) -> None:
    """PEFT casts x to the adapter's dtype, once per layer."""
    x = torch.randn(MIDDLE.rows, MIDDLE.d_in, dtype=wide, requires_grad=has_graph)
    base = torch.randn(MIDDLE.rows, MIDDLE.d_out, dtype=wide)
    pairs = [problem(MIDDLE, DTYPES[0], seed=seed) for seed in range(readers)]
    adapters = [(p.A.to(narrow).requires_grad_(), p.B.to(narrow).requires_grad_()) for p in pairs]

    def stock(A: Tensor, B: Tensor) -> Tensor:
        return base + 2.0 * nn.functional.linear(nn.functional.linear(x.to(narrow), A), B)

    parameters = [tensor for pair in adapters for tensor in pair]
    retained = measure(lambda: [safe_kernels.lora(x, base, A, B, 2.0) for A, B in adapters], exclude=parameters)
    assert retained.bytes == narrow.itemsize * x.numel(), str(retained)
    for (A, B), out in zip(adapters, retained.output, strict=True):
        got = torch.autograd.grad(out.square().sum(), (A, B), retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(stock(A, B).square().sum(), (A, B)), strict=True):
            assert (a - b).abs().max() <= 8 * torch.finfo(narrow).eps * b.abs().max()


def test_a_copy_is_not_shared_after_a_write_that_no_version_counter_shows() -> None:
    x = torch.randn(MIDDLE.rows, MIDDLE.d_in)
    older = x.numpy()
    base = torch.randn(MIDDLE.rows, MIDDLE.d_out)
    A, B = torch.randn(4, MIDDLE.d_in).bfloat16(), torch.randn(MIDDLE.d_out, 4).bfloat16().requires_grad_()
    A.requires_grad_()
    safe_kernels.lora(x, base, A, B, 2.0)
    first = safe_kernels.lora(x, base, A, B, 2.0)
    older *= 2
    second = safe_kernels.lora(x, base, A, B, 2.0)
    grads = [torch.autograd.grad(out.sum(), A)[0].float() for out in (first, second)]
    torch.testing.assert_close(grads[1], 2 * grads[0], rtol=2e-2, atol=0.1)


def test_float64_keeps_its_digits_under_autocast() -> None:
    """PyTorch's autocast leaves float64 alone."""
    x = torch.randn(MIDDLE.rows, MIDDLE.d_in, dtype=torch.float64)
    p = problem(MIDDLE, DTYPES[1])
    A, B = p.A.requires_grad_(), p.B.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = safe_kernels.lora(x, p.base, A, B, 2.0)
        stock = p.base + 2.0 * nn.functional.linear(nn.functional.linear(x, A), B)
    for got, expected in zip(*(torch.autograd.grad(out.sum(), (A, B)) for out in (ours, stock)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flags", [(True, False, True, True), (False, False, False, True)], ids=subset_id)
def test_statistics_retain_nothing(flags: tuple[bool, ...]) -> None:
    p = problem(Shape(300, 33, 20, 8)).require(*flags)
    statistics = safe_kernels.AdapterStatistics(blocks=safe_kernels.RowBlocks.spread(300))
    retained = measure(lambda: p.call(safe_kernels.lora, statistics=statistics), exclude=(p.A, p.B))
    assert statistics.rows > 0
    assert retained.bytes == expected_bytes(p.x, p.A, flags, 0.0, 1)


def test_a_given_state_is_shared_by_the_calls_it_is_given_to() -> None:
    p = problem(MIDDLE, dropout_p=0.1).require(x=False)
    retained = measure(lambda: [p.call(safe_kernels.lora) for _ in range(3)], exclude=(p.A, p.B))
    assert retained.bytes == p.x.nbytes + RNG_BYTES


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strided_x_is_not_copied(layout: str) -> None:
    p = problem(MIDDLE)
    views = {
        "transposed": lambda: torch.randn(MIDDLE.d_in, MIDDLE.rows).t(),
        "strided": lambda: torch.randn(MIDDLE.rows, 2 * MIDDLE.d_in)[:, ::2],
        "expanded": lambda: torch.randn(1, MIDDLE.d_in).expand(MIDDLE.rows, -1),
    }
    x = views[layout]()
    A, B = nn.Parameter(p.A), nn.Parameter(p.B)
    retained = measure(lambda: [safe_kernels.lora(x, p.base, A, B, 2.0) for _ in range(3)], exclude=(A, B))
    assert retained.bytes == x.untyped_storage().nbytes()
    assert len(retained.tensors) == 1


def test_x_that_another_layer_retains_costs_nothing_more() -> None:
    p = problem(MIDDLE)
    weight, A, B = (nn.Parameter(tensor) for tensor in (torch.randn(20, 33), p.A, p.B))
    source = torch.randn(37, 33, requires_grad=True)

    def forward() -> Tensor:
        x = source.sigmoid()  # retains its output, which is x
        return safe_kernels.lora(x, nn.functional.linear(x, weight), A, B, 2.0)

    retained = measure(forward, exclude=(weight, A, B))
    assert retained.bytes == p.x.nbytes
    assert retained.tensors[0].uses == 3


def test_mixed_precision_retains_no_upcast_copy() -> None:
    p = problem(MIDDLE, DTYPES[4]).require(x=True, base=True)
    retained = measure(lambda: p.call(safe_kernels.lora), exclude=(p.A, p.B))
    assert [tensor.dtype for tensor in retained.tensors] == [torch.bfloat16]


def test_a_frozen_layers_detached_adapter_is_no_retained_tensor() -> None:
    p = problem(MIDDLE).require(A=False, B=False)
    A, B = nn.Parameter(p.A), nn.Parameter(p.B)
    retained = measure(lambda: safe_kernels.lora(p.x, p.base, A.detach(), B.detach(), 2.0), exclude=(A, B))
    assert retained.bytes == 0
    assert retained.output.requires_grad


def test_stock_peft_by_the_same_measure() -> None:
    """The incumbent, so that the contract is a comparison: a dropped copy, h, and the mask."""
    A, B = (nn.Parameter(tensor) for tensor in (torch.randn(8, 33), torch.randn(20, 8)))
    dropout = nn.Dropout(0.1)
    dropped, h = 37 * 33 * 4, 37 * 8 * 4
    for x in (torch.randn(37, 33), torch.randn(37, 33, requires_grad=True)):
        stock = measure(lambda x=x: nn.functional.linear(nn.functional.linear(dropout(x), A), B), exclude=(A, B))
        mask = 37 * 33 * 4 if x.requires_grad else 0  # on a CPU a float for every element
        assert stock.bytes == dropped + h + mask
        ours = measure(lambda x=x: safe_kernels.lora(x, torch.zeros(37, 20), A, B, 1.0, dropout_p=0.1), exclude=(A, B))
        assert ours.bytes == x.nbytes + RNG_BYTES


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer holds freed memory back")
def test_two_thousand_steps_do_not_grow() -> None:
    p = problem(Shape(64, 48, 40, 4)).require()
    statistics = safe_kernels.AdapterStatistics(blocks=safe_kernels.RowBlocks.spread(64, block_rows=32))

    def resident_after(steps: int) -> int:
        for step in range(steps):
            p.require(A=step % 3 != 0, B=step % 3 != 0)
            out = safe_kernels.lora(*p.inputs, 2.0, dropout_p=0.1, statistics=statistics if step % 5 == 0 else None)
            out.backward(p.grad)
            for tensor in p.inputs:
                tensor.grad = None
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_after(300)
    growth = resident_after(2000) - before
    # One x of 12 KiB leaked a step would be 24 MiB, one random state with its tensor 1 MiB.
    assert growth < 2**19, f"{growth / 2**20:.1f} MiB over 2,000 steps"
