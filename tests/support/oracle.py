"""The truth that the ops are judged by, written without them: plain formulas in float64 and a Philox of its own.

An op passes when its error is at most twice that of the same formula evaluated by plain PyTorch in the working dtype
(which is what PEFT does), plus a few roundings of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RANKS = (1, 3, 8, 17, 64)
WIDTHS = (1, 5, 33, 384)
ROWS = (0, 1, 2, 37, 130, 1000)


@dataclass(frozen=True)
class Shape:
    """One problem size: x [rows, d_in], out [rows, d_out], rank r."""

    rows: int
    d_in: int
    d_out: int
    rank: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.d_in}-{self.rank}-{self.d_out}"


def taking_turns(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The product of all axes but the last, whose values take turns, so that every pair of values is there."""
    *crossed, last = axes
    numbers = product(*map(range, map(len, crossed)))
    return [(*(axis[i] for axis, i in zip(crossed, n, strict=True)), last[sum(n) % len(last)]) for n in numbers]


def shapes() -> list[Shape]:
    """Every rank with every row count, the widths cycling; and every pair of widths at one rank."""
    pairs = [(d_in, d_out) for d_in in WIDTHS for d_out in WIDTHS]
    crossed = [(rank, rows) for rank in RANKS for rows in ROWS]
    # 7 is coprime to 16, so that neighbours in the list differ in both widths.
    cycled = [Shape(rows, *pairs[7 * i % len(pairs)], rank) for i, (rank, rows) in enumerate(crossed)]
    return [*cycled, *(Shape(37, d_in, d_out, 8) for d_in, d_out in pairs)]


@dataclass(frozen=True)
class Dtypes:
    """Of x and base, and of the adapter."""

    x: torch.dtype
    adapter: torch.dtype

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.x, self.adapter)]
        return names[0] if names[0] == names[1] else f"{names[1]}-over-{names[0]}"


DTYPES = (
    Dtypes(torch.float32, torch.float32),
    Dtypes(torch.float64, torch.float64),
    Dtypes(torch.bfloat16, torch.bfloat16),
    Dtypes(torch.float16, torch.float16),
    Dtypes(torch.bfloat16, torch.float32),
    Dtypes(torch.float16, torch.float32),
)


@dataclass
class Problem:
    """Inputs of one call, and the gradient that comes back to it."""

    x: Tensor
    base: Tensor
    A: Tensor
    B: Tensor
    grad: Tensor
    scaling: float = 2.0
    dropout_p: float = 0.0
    rng_state: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.base, self.A, self.B

    def require(self, x: bool = True, base: bool = True, A: bool = True, B: bool = True) -> Problem:
        for tensor, wanted in zip(self.inputs, (x, base, A, B), strict=True):
            tensor.requires_grad_(wanted)
        return self

    def call(self, lora: Callable[..., Tensor], **kwargs) -> Tensor:
        return lora(*self.inputs, self.scaling, dropout_p=self.dropout_p, rng_state=self.rng_state, **kwargs)


def problem(
    shape: Shape,
    dtypes: Dtypes = DTYPES[0],
    *,
    leading: tuple[int, ...] | None = None,
    dropout_p: float = 0.0,
    scaling: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Random inputs of the sizes that training has: activations about 1, an adapter that adds about 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    rows = (shape.rows,) if leading is None else leading
    return Problem(
        x=normal(*rows, shape.d_in, dtype=dtypes.x),
        base=normal(*rows, shape.d_out, dtype=dtypes.x),
        A=normal(shape.rank, shape.d_in, dtype=dtypes.adapter, scale=shape.d_in**-0.5),
        B=normal(shape.d_out, shape.rank, dtype=dtypes.adapter, scale=shape.rank**-0.5),
        grad=normal(*rows, shape.d_out, dtype=dtypes.x),
        scaling=scaling,
        dropout_p=dropout_p,
        rng_state=rng_state(seed) if dropout_p > 0 else None,
    )


def rng_state(seed: int) -> Tensor:
    """A seed and an offset that use all 64 bits, sign included."""
    words = np.random.default_rng(seed).integers(-(2**63), 2**63, size=2, dtype=np.int64)
    return torch.from_numpy(words)


# ---------------------------------------------------------------- Philox4x32-7 (Salmon et al. 2011), by numpy


def philox(counter: list[np.ndarray], key: list[int]) -> list[np.ndarray]:
    """Four 32-bit words for each counter of four 32-bit words; everything is held in uint64."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(7):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> shift) ^ c[1] ^ k[0], p1 & mask, (p0 >> shift) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c


def keep_mask(rows: int, columns: int, dropout_p: float, state: Tensor) -> np.ndarray:
    """True where dropout keeps an element, by 16 bits: half col % 2 of word col // 2 % 4 of counter (col // 8, ...)."""
    seed, offset = (int(word) & (2**64 - 1) for word in state)
    column, row = np.meshgrid(np.arange(columns), np.arange(rows))
    counter = [column // 8, row, np.full_like(row, offset & 0xFFFFFFFF), np.full_like(row, offset >> 32)]
    words = np.stack(philox(counter, [seed & 0xFFFFFFFF, seed >> 32]))
    chosen = np.take_along_axis(words, (column // 2 % 4)[None], axis=0)[0]
    bits = (chosen >> (16 * (column % 2)).astype(np.uint64)) & np.uint64(0xFFFF)
    return bits >= round(65536 * rounded(dropout_p))


def rounded(dropout_p: float) -> float:
    """The probability with which dropout drops: a multiple of 2**-16, and 1 for 1 alone."""
    return 1.0 if dropout_p == 1 else min(round(dropout_p * 65536), 65535) / 65536


# ---------------------------------------------------------------- the op and its gradients


NAMES = ("out", "x", "base", "A", "B")
Results = dict[str, Tensor]


def formulas(x, base, A, B, grad, scaling, factor) -> tuple[np.ndarray, ...]:
    """The output, and the gradients of x, base, A and B."""
    dropped = x * factor
    h = dropped @ A.T
    grad_h = scaling * (grad @ B)
    return base + scaling * (h @ B.T), (grad_h @ A) * factor, grad, grad_h.T @ dropped, scaling * (grad.T @ h)


@dataclass
class Truth:
    """The exact results, and for each of them how large it would be if its terms did not cancel."""

    exact: Results
    size: dict[str, float]


def truth(p: Problem) -> Truth:
    """By the formulas in float64; in extended precision for a float64 problem."""
    real = np.longdouble if p.x.dtype == torch.float64 else np.float64
    tensors = (*p.inputs, p.grad)
    rows = [t.detach().double().reshape(-1, t.shape[-1]).numpy().astype(real) for t in tensors]
    factor = real(1)
    if p.dropout_p > 0:
        keep = keep_mask(*rows[0].shape, p.dropout_p, p.rng_state)
        factor = keep * (real(0) if p.dropout_p == 1 else 1 / (1 - real(rounded(p.dropout_p))))
    values = formulas(*rows, real(p.scaling), factor)
    # Of terms with random signs, the squares add up.
    squares = formulas(*(t**2 for t in rows), real(p.scaling) ** 2, factor**2)
    exact = {
        name: torch.from_numpy(value.astype(np.float64)).reshape(like.shape)
        for name, value, like in zip(NAMES, values, (p.base, *p.inputs), strict=True)
    }
    return Truth(exact, {name: float(np.sqrt(v.max(initial=0))) for name, v in zip(NAMES, squares, strict=True)})


def plain(p: Problem) -> Results:
    """What PEFT computes, in the working dtype, by plain PyTorch: the incumbent's error."""

    def run(x: Tensor, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
        dropped = x.to(A.dtype)
        if p.dropout_p > 0:
            keep = torch.from_numpy(keep_mask(x[..., 0].numel(), x.shape[-1], p.dropout_p, p.rng_state))
            scale = 0.0 if p.dropout_p == 1 else 1 / (1 - rounded(p.dropout_p))
            dropped = dropped * (keep.reshape(x.shape).to(A.dtype) * scale)
        return (base + F.linear(F.linear(dropped, A), B) * p.scaling).to(base.dtype)

    return _results(p, run)


def ours(p: Problem, lora: Callable[..., Tensor]) -> Results:
    """What the op computes, with every argument requiring grad."""
    return _results(p, lambda *inputs: lora(*inputs, p.scaling, dropout_p=p.dropout_p, rng_state=p.rng_state))


def _results(p: Problem, run: Callable[..., Tensor]) -> Results:
    leaves = [tensor.detach().requires_grad_() for tensor in p.inputs]
    out = run(*leaves)
    grads = torch.autograd.grad(out, leaves, p.grad)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def assert_as_good(name: str, got: Tensor, incumbent: Tensor, exact: Truth) -> None:
    """Fails when `got` is more than twice as far from the truth as `incumbent`, give or take a few roundings."""
    expected = exact.exact[name]
    assert got.shape == expected.shape, f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}"
    assert got.dtype == incumbent.dtype, f"{name}: {got.dtype}, expected {incumbent.dtype}"
    if expected.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error, allowed = ((tensor.double() - expected).abs().max().item() for tensor in (got, incumbent))
    # A result of few elements may be exact by luck in one order of summation and not in another.
    roundings = 1 if got.dtype in (torch.bfloat16, torch.float16) else 4
    floor = roundings * torch.finfo(got.dtype).eps * max(expected.abs().max().item(), exact.size[name])
    assert error <= 2 * allowed + floor, f"{name}: error {error:.3e}, plain PyTorch's {allowed:.3e}, floor {floor:.1e}"


def assert_results(p: Problem, got: Results) -> None:
    """Judges those results that are there."""
    incumbent, exact = plain(p), truth(p)
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], exact)


# ---------------------------------------------------------------- 1 - CKA


def one_minus_cka(p: Problem, starts: list[int], block_rows: int, weight: np.ndarray | None = None) -> float:
    """1 - CKA(X, Y) from its definition, extended precision: X = base, Y = base + scaling x A' B', block by block."""
    real = np.longdouble
    x, base, A, B = (t.detach().double().reshape(-1, t.shape[-1]).numpy().astype(real) for t in p.inputs)
    # Float64 products carry 1e-16 of delta only; the Gram matrices, where cancellation happens, are extended.
    y = base + real(p.scaling) * (x @ A.T @ B.T)
    cross = own = adapted = real(0)
    for start in starts:
        rows = np.arange(start, min(start + block_rows, len(base)))
        if weight is not None:
            rows = rows[weight[rows] != 0]
        X, Y = (features[rows] - features[rows].mean(0) for features in (base, y))
        K, L = X @ X.T, Y @ Y.T
        cross, own, adapted = cross + (K * L).sum(), own + (K * K).sum(), adapted + (L * L).sum()
    return float(1 - cross / np.sqrt(own * adapted))
