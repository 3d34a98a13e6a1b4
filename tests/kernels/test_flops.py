"""FLOPs counted against the products that plain PyTorch would make."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from bottlenecks import bottleneck
from convs import WINDOWS, Window, conv
from doras import dora
from oracle import Shape, problem
from torch.utils.flop_counter import FlopCounterMode

import safe_kernels
from safe_kernels.flops import statistics_flop

SHAPE = Shape(24, 10, 7, 3)
N, D_IN, D_OUT, R = SHAPE.rows, SHAPE.d_in, SHAPE.d_out, SHAPE.rank


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def products(p, wanted: tuple[bool, bool, bool]) -> int:
    """The same by separate matrix products, counted by PyTorch's own formulas."""
    h = p.x.flatten(0, -2) @ p.A.t()  # what forward keeps where lora_B alone trains

    def run() -> None:
        x, grad = p.x.flatten(0, -2), p.grad.flatten(0, -2)
        if wanted[0] or wanted[1]:
            grad_h = grad @ p.B
        if wanted[0]:
            grad_h @ p.A
        if wanted[1]:
            grad_h.t() @ x
        if wanted[2]:
            grad.t() @ (x @ p.A.t() if wanted[1] else h @ torch.eye(R))  # as x, with an identity as lora_A

    return count(run)


@pytest.mark.parametrize("leading", [(24,), (4, 6)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_forward(leading: tuple[int, ...], dropout_p: float) -> None:
    p = problem(SHAPE, leading=leading, dropout_p=dropout_p)
    expected = count(lambda: p.x.flatten(0, -2) @ p.A.t() @ p.B.t())
    assert count(lambda: p.call(safe_kernels.lora)) == expected == 2 * N * R * (D_IN + D_OUT)


@pytest.mark.parametrize("wanted", list(product([False, True], repeat=3)), ids=str)
def test_backward_makes_only_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    p = problem(SHAPE, leading=(4, 6)).require(wanted[0], True, wanted[1], wanted[2])
    out = p.call(safe_kernels.lora)
    assert count(lambda: out.backward(p.grad)) == products(p, wanted)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_dora(dropout_p: float) -> None:
    p = dora(SHAPE, dropout_p=dropout_p).require("x", "A", "B", "magnitude")
    large, products = 2 * N * D_IN * D_OUT, 2 if dropout_p else 1
    assert count(p.call) == products * large + 2 * R * D_IN * D_OUT + 2 * N * R * (D_IN + D_OUT)
    out = p.call()
    assert count(lambda: out.backward(p.grad)) == (products + 1) * large + 2 * N * R * (3 * D_IN + 2 * D_OUT)


@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[2], WINDOWS[5]], ids=str)
def test_lora_conv(window: Window) -> None:
    """As PEFT's convolutions, and h once more in backward."""
    p = conv(window).require("x", "A", "B")
    stock, out = p.formula()(**p.inputs), p.call()
    assert count(p.call) == count(lambda: p.formula()(**p.inputs))
    again = 2 * out[:, 0].numel() * p.A.numel()
    assert count(lambda: out.backward(p.grad)) == count(lambda: stock.backward(p.grad)) + again
    p.require("x")
    stock, out = p.formula()(**p.inputs), p.call()
    assert count(lambda: out.backward(p.grad)) == count(lambda: stock.backward(p.grad))


def test_bottleneck() -> None:
    """Forward; backward of everything, of x through bits, of W_up (from h, with an identity), and of b_up."""
    inner, outer = 2 * N * R * D_IN, 2 * N * R * D_OUT
    expected = {(): 3 * inner + 2 * outer, ("x",): inner + outer, ("W_up",): outer + 2 * N * R * R, ("b_up",): 0}
    for names, flops in expected.items():
        p = bottleneck(SHAPE).require(*(names or ("x", "W_down", "b_down", "W_up", "b_up")))
        assert count(p.call) == inner + outer
        out = p.call()
        assert count(lambda p=p, out=out: out.backward(p.grad)) == flops


def test_freezing_saves_flops() -> None:
    p = problem(SHAPE).require()
    training = count(lambda: p.call(safe_kernels.lora).sum().backward())
    p.require(A=False, B=False)
    frozen = count(lambda: p.call(safe_kernels.lora).sum().backward())
    forward = 2 * N * R * (D_IN + D_OUT)
    assert training == forward + 2 * N * R * (3 * D_IN + 2 * D_OUT)
    assert frozen == 2 * forward


def test_statistics() -> None:
    p = problem(SHAPE)
    plain = count(lambda: p.call(safe_kernels.lora))
    for blocks, block_rows, scored_rows in ((1, 8, 8), (3, 8, 8), (1, 100, N)):
        chosen = safe_kernels.RowBlocks.spread(N, blocks=blocks, block_rows=block_rows)
        statistics = safe_kernels.AdapterStatistics(blocks=chosen)
        scored = count(lambda statistics=statistics: p.call(safe_kernels.lora, statistics=statistics))
        assert scored - plain == blocks * statistics_flop(scored_rows, D_OUT, R)


def test_statistics_of_one_block_by_its_products() -> None:
    X, h, B = torch.ones(8, D_OUT), torch.ones(8, R), torch.ones(D_OUT, R)
    VH, HV = torch.ones(8, 2 * R), torch.ones(8, 2 * R)
    rectangular = count(lambda: (X @ B, B.t() @ B, h @ torch.ones(R, R)))
    symmetric = count(lambda: (X @ X.t(), VH @ HV.t()))
    # One triangle with its diagonal: (n + 1) / 2 n of the square.
    assert statistics_flop(8, D_OUT, R) == rectangular + symmetric * 9 // 16


def test_modules_are_told_apart() -> None:
    class Layer(torch.nn.Module):
        def forward(self, p):
            return p.call(safe_kernels.lora)

    p = problem(SHAPE)
    model = torch.nn.Module()
    model.first, model.second = Layer(), Layer()
    with FlopCounterMode(display=False) as counter:
        model.first(p)
        model.second(p)
        model.second(p)
    counts = counter.get_flop_counts()
    one = 2 * N * R * (D_IN + D_OUT)
    assert counts["Layer"][torch.ops.safe_kernels.lora] in (one, 3 * one)
    assert counts["Global"][torch.ops.safe_kernels.lora] == 3 * one
