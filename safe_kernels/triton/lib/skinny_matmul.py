"""One sweep over a matrix [M, K]: its product with a narrow matrix, and its transpose's product with another.

Both large dimensions of an adapter are swept this way::

    forward     of x       product h = dropout(x) A'
    backward    of grad    product grad B, and for a low rank the transposed product grad' h

Sums over K are split into `splits` parts, and sums over M into tiles of rows. The parts are stored separately and added
in a fixed order, so that results do not depend on the order in which programs run. A narrow matrix has `padded`
columns, zero after the rank: its rows are aligned for wide loads and need no mask.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.lib.philox import _keep, _rng_words
from safe_kernels.triton.lib.terms import _factor, _multiply, _no_sums, _total
from safe_kernels.triton.runtime.configs import Config, config, rank_tile, splits
from safe_kernels.triton.runtime.host import TYPES, Dropout, Product, adapter_product, tuned
from safe_kernels.triton.runtime.launch_replay import empty, launch


@triton.jit
def _load_parts(parts, offs_m, offs_r, M, width, SPLITS: tl.constexpr):
    """A tile of the sum of parts [SPLITS, M, width], zero outside."""
    mask = (offs_m < M)[:, None] & (offs_r < width)[None, :]
    at = offs_m.to(tl.int64)[:, None] * width + offs_r[None, :]
    acc = tl.load(parts + at, mask=mask, other=0.0)
    for part in tl.static_range(1, SPLITS):
        acc += tl.load(parts + part * tl.cast(M, tl.int64) * width + at, mask=mask, other=0.0)
    return acc


@triton.jit
def _load_narrow(narrow, offs_r, offs_n, R, stride_narrow_r, stride_narrow_n, mask_n):
    """A tile of the adapter's matrix [R, N], zero outside; offs_n and mask_n are [1, BLOCK_N]."""
    at = narrow + offs_r.to(tl.int64)[:, None] * stride_narrow_r + offs_n * stride_narrow_n
    return tl.load(at, mask=(offs_r < R)[:, None] & mask_n, other=0.0)


@triton.jit
def _lora_sweep_kernel(
    matrix,  # [M, K]
    narrow,  # [R, K]
    other,  # [OTHER_SPLITS, M, width]
    rng,
    product,  # [splits, M, width]
    transposed,  # [tiles of rows, K, width]
    M,
    K,
    R,
    width,
    stride_matrix_m,
    stride_matrix_k,
    stride_narrow_r,
    stride_narrow_k,
    split_k,
    product_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    COMPUTE_TRANSPOSED: tl.constexpr,
    OTHER_SPLITS: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    begin = part * split_k
    end = tl.minimum(begin + split_k, K)
    matrix_rows = matrix + offs_m.to(tl.int64)[:, None] * stride_matrix_m
    narrow_rows = narrow + offs_r.to(tl.int64)[None, :] * stride_narrow_r
    sums = _no_sums(BLOCK_M, BLOCK_R, PRECISION)
    if HAS_DROPOUT:
        words = _rng_words(rng)
    if COMPUTE_TRANSPOSED:
        factor = _factor(_load_parts(other, offs_m, offs_r, M, width, OTHER_SPLITS), OPERAND, PRECISION)
    for start_k in range(begin, end, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        tile = tl.load(
            matrix_rows + offs_k.to(tl.int64)[None, :] * stride_matrix_k,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        ).to(OPERAND)
        if HAS_DROPOUT:
            # Multiplied, not selected: NaN stays NaN, as in the reference.
            tile = tile * _keep(words, offs_m, start_k, threshold, BLOCK_K).to(OPERAND)
        weight = tl.load(
            narrow_rows + offs_k.to(tl.int64)[:, None] * stride_narrow_k,
            mask=mask_k[:, None] & mask_r[None, :],
            other=0.0,
        )
        sums = _multiply(tile, _factor(weight, OPERAND, PRECISION), sums, PRECISION)
        if COMPUTE_TRANSPOSED:
            outer = _multiply(tl.trans(tile), factor, _no_sums(BLOCK_K, BLOCK_R, PRECISION), PRECISION)
            at = (tl.program_id(0).to(tl.int64) * K + offs_k)[:, None] * width + offs_r[None, :]
            tl.store(transposed + at, _total(outer, PRECISION), mask=mask_k[:, None] & (offs_r < width)[None, :])
    at = (part.to(tl.int64) * M + offs_m)[:, None] * width + offs_r[None, :]
    # Columns after the rank are 0, even where a row overflowed and 0 * infinity is NaN.
    acc = tl.where(mask_r[None, :], _total(sums, PRECISION) * product_scale, 0.0)
    tl.store(product + at, acc, mask=mask_m[:, None] & (offs_r < width)[None, :])


@triton.jit
def _add_parts(
    parts,
    out,
    count,
    N,
    R,
    width,
    stride_out_n,
    stride_out_r,
    scale,
    tile,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A tile of the sum of parts [count, N, width], in a fixed order; out is [N, R]."""
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = (offs_n < N)[:, None]
    mask = mask_n & (offs_r < width)[None, :]
    at = offs_n.to(tl.int64)[:, None] * width + offs_r[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for part in tl.range(0, count, loop_unroll_factor=4):  # several loads in flight
        acc += tl.load(parts + tl.cast(part, tl.int64) * N * width + at, mask=mask, other=0.0)
    to = out + offs_n.to(tl.int64)[:, None] * stride_out_n + offs_r.to(tl.int64)[None, :] * stride_out_r
    tl.store(to, (acc * scale).to(out.dtype.element_ty), mask=mask_n & (offs_r < R)[None, :])


@triton.jit
def _reduce_kernel(
    parts,  # [count, N, width]
    out,  # [N, R]
    count,
    N,
    R,
    stride_out_n,
    stride_out_r,
    scale,
    other_parts,  # of a second sum, or None
    other_out,
    other_count,
    other_N,
    other_R,
    stride_other_n,
    stride_other_r,
    other_scale,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One sum of parts, or two of the same width: the programs after those of the first make the second."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    if tile < tiles:
        _add_parts(parts, out, count, N, R, width, stride_out_n, stride_out_r, scale, tile, BLOCK_N, BLOCK_R)
    elif other_parts is not None:
        _add_parts(
            other_parts,
            other_out,
            other_count,
            other_N,
            other_R,
            width,
            stride_other_n,
            stride_other_r,
            other_scale,
            tile - tiles,
            BLOCK_N,
            BLOCK_R,
        )


def sweep(
    matrix: Tensor,
    narrow: Tensor,
    dropout: Dropout,
    scale: float = 1.0,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The product of matrix [M, K] and narrow [R, K], in parts [splits, M, padded R], and a transposed product.

    `dropout` drops elements of `matrix` and does not scale the others; `scale` is a factor of the product. `other`, in
    parts [any, M, padded R], is the factor of the transposed product [tiles, K, padded R], which is empty without it.
    """
    name = "lora_sweep_both" if other is not None else "lora_sweep"
    name = name if dropout.rng_state is None else "lora_sweep_dropped"
    arithmetic = adapter_product(name, matrix.dtype, narrow.dtype, narrow.shape[0])
    run = partial(_sweep, matrix, narrow, arithmetic, dropout, scale, other)
    return tuned(name, run, (*matrix.shape, narrow.shape[0]), arithmetic, matrix)


def _sweep(
    matrix: Tensor,
    narrow: Tensor,
    arithmetic: Product,
    dropout: Dropout,
    scale: float,
    other: Tensor | None,
    chosen: Config,
) -> tuple[Tensor, Tensor]:
    (M, K), R = matrix.shape, narrow.shape[0]
    tiles, block_r, width = triton.cdiv(M, chosen.block_m), rank_tile(R, arithmetic.narrow, True), padded(R)
    parts, split_k = splits(tiles, K, chosen.block_k, chosen.slots)
    result = empty(matrix, (parts, M, width), dtype=torch.float32)
    outer = empty(matrix, 0 if other is None else (tiles, K, width), dtype=torch.float32)
    launch(
        _lora_sweep_kernel,
        (tiles, parts, triton.cdiv(R, block_r)),
        matrix,
        narrow,
        other,
        dropout.rng_state,
        result,
        outer,
        M,
        K,
        R,
        width,
        *matrix.stride(),
        *narrow.stride(),
        split_k,
        scale,
        dropout.threshold,
        BLOCK_R=block_r,
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_DROPOUT=dropout.rng_state is not None,
        COMPUTE_TRANSPOSED=other is not None,
        OTHER_SPLITS=1 if other is None else other.shape[0],
        **chosen.constants,
    )
    return result, outer


def padded(rank: int) -> int:
    """Columns of a narrow matrix in memory: a multiple of 16, so that wide loads can read its rows.

    Example:
        >>> padded(8), padded(16), padded(17)
        (16, 16, 32)
    """
    return triton.cdiv(rank, 16) * 16


class Sum(NamedTuple):
    """A sum of parts [count, N, width] in a fixed order: scale times its first `rank` columns."""

    parts: Tensor
    rank: int
    scale: float
    dtype: torch.dtype
    transpose: bool = False  # whether the result is [rank, N], not [N, rank]


def reduce(first: Sum, second: Sum | None = None) -> tuple[Tensor, ...]:
    """One or two sums of parts of the same width, by one launch."""
    sums = [first] if second is None else [first, second]
    outs = [
        empty(each.parts, (each.rank, each.parts.shape[1])[:: 1 if each.transpose else -1], dtype=each.dtype)
        for each in sums
    ]
    chosen, rank = config("reduce", first.dtype), max(each.rank for each in sums)
    block_r = rank_tile(rank, torch.float32)
    launch(
        _reduce_kernel,
        (sum(triton.cdiv(each.parts.shape[1], chosen.block_n) for each in sums), triton.cdiv(rank, block_r)),
        *_operands(first, outs[0]),
        *((None, None, 0, 0, 0, 0, 0, 0.0) if second is None else _operands(second, outs[1])),
        first.parts.shape[2],
        BLOCK_N=chosen.block_n,
        BLOCK_R=block_r,
        **chosen.options,
    )
    return tuple(outs)


def _operands(each: Sum, out: Tensor) -> tuple[Tensor, Tensor, int, int, int, int, int, float]:
    count, N, _ = each.parts.shape
    stride_n, stride_r = out.stride()[:: -1 if each.transpose else 1]
    return each.parts, out, count, N, each.rank, stride_n, stride_r, each.scale


def joining(parts: Tensor, dtype: torch.dtype) -> Sum:
    """The sum of a product's parts, for a kernel that reads it once for every tile of columns."""
    return Sum(parts, parts.shape[2], 1.0, dtype)


def joined(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """`joining` [M, padded R], where there is anything to add."""
    return parts[0] if parts.shape[0] == 1 else reduce(joining(parts, dtype))[0]
