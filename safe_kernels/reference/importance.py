"""Importance 1 - CKA: Son et al. 2025 (arXiv 2412.03587); linear CKA: Kornblith et al. 2019 (arXiv 1905.00414)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_BLOCK_ROWS = 8192
"""The most rows of a block: two square float64 matrices with this many rows take 1 GiB."""


def cka_sums(
    base: Tensor, delta: Tensor, block_starts: Tensor, block_rows: int, row_weight: Tensor | None = None
) -> Tensor:
    """Return the sums (a, b, c, number of rows) from which `one_minus_cka` computes the importance of an adapter.

    X = base and Y = base + delta [N, d_out], centred over the rows of each block; K = Xc Xc' and E = Yc Yc' - K. The
    sums are a = |K|^2, b = <K, E> and c = |E|^2, added over all blocks. So the sums of several calls, micro-batches or
    processes can be added (minibatch CKA, Nguyen et al. 2021, arXiv 2010.15327). A block ends at row N at the latest; a
    row whose `row_weight` [N] is zero does not count.
    """
    check_blocks(base, block_starts, block_rows, row_weight)
    sums = base.new_zeros(4, dtype=torch.float64)
    if base.shape[0] == 0 or block_starts.shape[0] == 0:
        return sums
    rows = block_starts[:, None] + torch.arange(min(block_rows, base.shape[0]), device=base.device)
    inside = (rows >= 0) & (rows < base.shape[0])
    rows = rows.clamp(0, base.shape[0] - 1)
    counts = inside if row_weight is None else inside & (row_weight[rows] != 0)
    weight = counts.to(torch.float64)[:, :, None]
    total = weight.sum(1, keepdim=True)
    several = weight * (total >= 2)  # a single row, centred, is always zero

    def centred(features: Tensor) -> Tensor:
        block = features[rows].to(torch.float64).masked_fill(several == 0, 0.0)
        return (block - block.sum(1, keepdim=True) / total.clamp(min=1)) * several

    X, D = centred(base), centred(delta)
    K, cross = X @ X.mT, D @ X.mT
    E = cross + cross.mT + D @ D.mT
    return torch.stack([(K * K).sum(), (K * E).sum(), (E * E).sum(), weight.sum()])


def check_blocks(base: Tensor, block_starts: Tensor, block_rows: int, row_weight: Tensor | None) -> None:
    """Check the blocks that are to be scored. The GPU code uses this too; the CPU kernel has the same messages."""
    if block_starts.dtype != torch.int64 or block_starts.dim() != 1:
        raise ValueError(f"block_starts must be int64 [n], got {block_starts.dtype} {list(block_starts.shape)}")
    if row_weight is not None and row_weight.shape != base.shape[:1]:
        raise ValueError(f"row_weight must have shape {list(base.shape[:1])}, got {list(row_weight.shape)}")
    if block_rows > MOST_BLOCK_ROWS and base.shape[0] > MOST_BLOCK_ROWS:
        raise ValueError(
            f"block_rows must be at most {MOST_BLOCK_ROWS}, since a block takes two matrices of its rows squared, got "
            f"{block_rows}"
        )


def one_minus_cka(sums: Tensor) -> float:
    """Return 1 - CKA from the sums (a, b, c[, rows]) of `cka_sums`, without the cancellation of a subtraction from 1.

    CKA = (a + b) / sqrt(a (a + 2 b + c)) is the cosine between K and K + E. Its sine follows: sin^2 = (a c - b^2) / (a
    (a + 2 b + c)), and 1 - cos = sin^2 / (1 + cos).

    The result is in [0, 1], and exactly 0.0 for an adapter that changes nothing. It is nan if the features are
    constant, if no row was scored, or if a sum is not finite.
    """
    a, b, c = sums[:3].tolist()
    if not all(math.isfinite(value) for value in (a, b, c)) or a <= 0.0:
        return math.nan
    if c == 0.0:
        return 0.0
    # Ratios to a, because a * c of large features could overflow.
    b, c = b / a, c / a
    length = 1.0 + 2.0 * b + c
    if length <= 0.0:
        return math.nan
    sin2 = max(c - b * b, 0.0) / length
    return sin2 / (1.0 + (1.0 + b) / math.sqrt(length))
