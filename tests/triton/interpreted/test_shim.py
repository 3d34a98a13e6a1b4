"""The interpreter as the shims leave it: bfloat16 and tf32 as on a GPU, and nothing unforgivable goes unnoticed."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError


@triton.jit
def _arithmetic_kernel(x, y, added, multiplied, total, larger, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(added + at, a + b)
    tl.store(multiplied + at, a * b)
    tl.store(larger + at, tl.where(a > b, a, b))
    tl.store(total, tl.sum(a, axis=0))


def test_bfloat16_is_computed_and_rounded() -> None:
    x, y = torch.randn(2, 64).bfloat16()
    added, multiplied, larger = (torch.empty_like(x) for _ in range(3))
    total = torch.empty(1, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](x, y, added, multiplied, total, larger, WIDTH=64)
    assert torch.equal(added, x + y)
    assert torch.equal(multiplied, x * y)
    assert torch.equal(larger, torch.maximum(x, y))
    torch.testing.assert_close(total[0], x.sum())


@triton.jit
def _round_kernel(x, out, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at).to(tl.bfloat16))


def test_float32_is_rounded_to_nearest_even() -> None:
    x = torch.cat([torch.randn(60), torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, torch.nan, -torch.inf])])
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, WIDTH=64)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _dot_kernel(x, y, out, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision=PRECISION))


@pytest.mark.parametrize(
    ("dtype", "precision", "least", "most"),
    [(torch.float32, "ieee", 0, 1e-6), (torch.float32, "tf32", 1e-5, 2e-2), (torch.bfloat16, "ieee", 0, 1e-6)],
    ids=str,
)
def test_products_have_the_precision_that_is_asked_for(
    dtype: torch.dtype, precision: str, least: float, most: float
) -> None:
    x, y = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, out, PRECISION=precision)
    error = (out.double() - x.double() @ y.double()).abs().max() / 4
    assert least <= error <= most


@triton.jit
def _shift_kernel(x, out, shift, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out + at, tl.load(x + at + shift))


@pytest.mark.parametrize("shift", [-1, 1, 1000])
def test_an_access_outside_every_tensor_is_an_error(shift: int) -> None:
    whole = torch.zeros(2000)
    x, out = whole[900:932], torch.zeros(32)
    _shift_kernel[(2,)](x, out, 0, WIDTH=16)
    with pytest.raises(InterpreterError, match="load outside every tensor"):
        _shift_kernel[(2,)](x, out, shift, WIDTH=16)
    with pytest.raises(InterpreterError, match="store outside every tensor"):
        _shift_kernel[(3,)](whole, out, 0, WIDTH=16)


@triton.jit
def _collide_kernel(x, out, stride, SAME_LANES: tl.constexpr, READS: tl.constexpr, ATOMIC: tl.constexpr):
    at = tl.arange(0, 16)
    if ATOMIC:
        tl.atomic_add(out + at, 1.0)
    if READS:
        tl.store(out + tl.program_id(0), tl.sum(tl.load(out + at), axis=0))
    tl.store(x + tl.program_id(0) * stride + at // SAME_LANES, 1.0)


def collide(stride: int = 16, lanes: int = 1, reads: bool = False, atomic: bool = False) -> Tensor:
    x, out = torch.zeros(64), torch.zeros(16)
    _collide_kernel[(4,)](x, out, stride, SAME_LANES=lanes, READS=reads, ATOMIC=atomic)
    return x


def test_programs_that_collide_are_an_error() -> None:
    assert collide().sum() == 64
    with pytest.raises(InterpreterError, match=r"programs \d and \d write one address"):
        collide(stride=8)
    with pytest.raises(InterpreterError, match="writes one address twice"):
        collide(lanes=2)
    with pytest.raises(InterpreterError, match=r"reads what program \d has written"):
        collide(reads=True)
    with pytest.raises(InterpreterError, match="an atomic"):
        collide(atomic=True)


@triton.jit
def _order_kernel(out, WIDTH: tl.constexpr):
    tl.store(out + tl.program_id(0), tl.program_id(0))


def test_programs_run_in_another_order_and_all_of_them_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[int] = []
    before = InterpreterBuilder.create_get_program_id

    def noticed(self, axis):
        seen.append(self.grid_idx[0])
        return before(self, axis)

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", noticed)
    out = torch.full((20,), -1, dtype=torch.int32)
    _order_kernel[(20,)](out, WIDTH=1)
    assert torch.equal(out, torch.arange(20, dtype=torch.int32))
    assert seen[::2] != sorted(seen[::2])


@triton.jit
def _idle_kernel(out):
    pass


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536)], ids=str)
def test_a_grid_that_cuda_refuses(grid: tuple[int, ...]) -> None:
    with pytest.raises(InterpreterError) as caught:
        _idle_kernel[grid](torch.empty(1))
    assert "at most 65535" in str(caught.value.__cause__ or caught.value)
