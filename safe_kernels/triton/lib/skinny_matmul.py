"""One sweep over a matrix M [N, d]: its product with a narrow matrix, and its transpose's product with another.

Both of an adapter's large dimensions are swept this way::

    forward     M = x        product h = dropout(x) A'
    backward    M = grad     product grad B, and where the rank is narrow the transposed product grad' h

Sums over d are cut into `splits` parts and sums over N into tiles of rows; the parts lie in memory one by one and are
added in a fixed order, so that results do not depend on the order programs run in. Such a narrow matrix has rows of
`padded` columns, zero behind the rank: they begin where wide loads may, and need no mask.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.lib.philox import _keep
from safe_kernels.triton.runtime.configs import Config, config, rank_tile, splits
from safe_kernels.triton.runtime.host import TYPES, Dropout, Product, ceil_div, tuned
from safe_kernels.triton.runtime.launch_replay import empty, launch


@triton.jit
def _load_parts(parts, row, column, rows, columns, SPLITS: tl.constexpr):
    """A tile of the sum of parts [SPLITS, rows, columns], zero outside."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(parts + part * tl.cast(rows, tl.int64) * columns + at, mask=inside, other=0.0)
    return total


@triton.jit
def _load_narrow(narrow, r, column, rank, narrow_rank, narrow_column, column_inside):
    """A tile of the adapter's matrix [rank, columns], zero outside; column and column_inside are [1, COLUMNS]."""
    at = narrow + r.to(tl.int64)[:, None] * narrow_rank + column * narrow_column
    return tl.load(at, mask=(r < rank)[:, None] & column_inside, other=0.0)


@triton.jit
def _lora_sweep_kernel(
    matrix,  # [rows, columns]
    narrow,  # [rank, columns]
    other,  # [OTHER_SPLITS, rows, width]
    rng,
    product,  # [splits, rows, width]
    transposed,  # [tiles of rows, columns, width]
    rows,
    columns,
    rank,
    width,
    matrix_row,
    matrix_column,
    narrow_rank,
    narrow_column,
    split_columns,
    product_scale,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    COMPUTE_TRANSPOSED: tl.constexpr,
    OTHER_SPLITS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    r = tl.program_id(2) * RANK + tl.arange(0, RANK)
    row_inside, r_inside = row < rows, r < rank
    begin = part * split_columns
    end = tl.minimum(begin + split_columns, columns)
    matrix_rows = matrix + row.to(tl.int64)[:, None] * matrix_row
    narrow_rows = narrow + r.to(tl.int64)[None, :] * narrow_rank
    total = tl.zeros([ROWS, RANK], tl.float32)
    if COMPUTE_TRANSPOSED:
        factor = _load_parts(other, row, r, rows, width, OTHER_SPLITS).to(OPERAND)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_inside = column < end
        tile = tl.load(
            matrix_rows + column.to(tl.int64)[None, :] * matrix_column,
            mask=row_inside[:, None] & column_inside[None, :],
            other=0.0,
        ).to(OPERAND)
        if HAS_DROPOUT:
            # A product, not a choice: what is no number stays none, as in the reference.
            tile = tile * _keep(rng, row, first, threshold, COLUMNS).to(OPERAND)
        weight = tl.load(
            narrow_rows + column.to(tl.int64)[:, None] * narrow_column,
            mask=column_inside[:, None] & r_inside[None, :],
            other=0.0,
        ).to(OPERAND)
        total = tl.dot(tile, weight, total, input_precision=PRECISION)
        if COMPUTE_TRANSPOSED:
            outer = tl.dot(tl.trans(tile), factor, input_precision=PRECISION)
            at = (tl.program_id(0).to(tl.int64) * columns + column)[:, None] * width + r[None, :]
            tl.store(transposed + at, outer, mask=column_inside[:, None] & (r < width)[None, :])
    at = (part.to(tl.int64) * rows + row)[:, None] * width + r[None, :]
    # Behind the rank stands 0, and not the 0 * infinity of a row that overflowed.
    total = tl.where(r_inside[None, :], total * product_scale, 0.0)
    tl.store(product + at, total, mask=row_inside[:, None] & (r < width)[None, :])


@triton.jit
def _reduce_kernel(
    parts,  # [count, columns, width]
    out,  # [columns, rank]
    count,
    columns,
    rank,
    width,
    out_column,
    out_rank,
    scale,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    column_inside = (column < columns)[:, None]
    inside = column_inside & (r < width)[None, :]
    at = column.to(tl.int64)[:, None] * width + r[None, :]
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * columns * width + at, mask=inside, other=0.0)
    to = out + column.to(tl.int64)[:, None] * out_column + r.to(tl.int64)[None, :] * out_rank
    tl.store(to, (total * scale).to(out.dtype.element_ty), mask=column_inside & (r < rank)[None, :])


def sweep(
    matrix: Tensor,
    narrow: Tensor,
    arithmetic: Product,
    dropout: Dropout,
    scale: float = 1.0,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches the sweep.

    Args:
        matrix: [N, d], any strides.
        narrow: [r, d], any strides.
        arithmetic: how to multiply.
        dropout: drops elements of `matrix`, without making the rest grow.
        scale: what the product is multiplied by.
        other: [parts, N, padded r], the factor of the transposed product; None when that is not wanted.

    Returns:
        The product's parts [splits, N, padded r], and the transposed product's [tiles, d, padded r], or nothing.
    """
    name = "lora_sweep_both" if other is not None else "lora_sweep"
    name = name if dropout.rng_state is None else "lora_sweep_dropped"
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
    (rows, columns), rank = matrix.shape, narrow.shape[0]
    tiles, tile, width = ceil_div(rows, chosen.rows), rank_tile(rank, arithmetic.operand, True), padded(rank)
    parts, split_columns = splits(tiles, columns, chosen.columns)
    result = empty(matrix, (parts, rows, width), dtype=torch.float32)
    outer = empty(matrix, 0 if other is None else (tiles, columns, width), dtype=torch.float32)
    launch(
        _lora_sweep_kernel,
        (tiles, parts, ceil_div(rank, tile)),
        matrix,
        narrow,
        other,
        dropout.rng_state,
        result,
        outer,
        rows,
        columns,
        rank,
        width,
        *matrix.stride(),
        *narrow.stride(),
        split_columns,
        scale,
        dropout.threshold,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        RANK=tile,
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_DROPOUT=dropout.rng_state is not None,
        COMPUTE_TRANSPOSED=other is not None,
        OTHER_SPLITS=1 if other is None else other.shape[0],
        **chosen.options,
    )
    return result, outer


def padded(rank: int) -> int:
    """Columns of a narrow matrix in memory: 16 divides them, so that its rows may be read in wide loads.

    Args:
        rank: the adapter's rank.

    Example:
        >>> padded(8), padded(16), padded(17)
        (16, 16, 32)
    """
    return -(-rank // 16) * 16


def joined(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of a product's parts, for a kernel that reads it once for every tile of columns.

    Args:
        parts: [splits, N, padded r].
        dtype: what that kernel converts it to.

    Returns:
        [N, padded r].
    """
    return parts[0] if parts.shape[0] == 1 else reduce(parts, parts.shape[2], 1.0, dtype)


def reduce(parts: Tensor, rank: int, scale: float, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """Adds parts in their order.

    Args:
        parts: [count, d, at least r].
        rank: r.
        scale: what the sum is multiplied by.
        dtype: dtype of the result.
        transpose: whether the result is [r, d] instead of [d, r].

    Returns:
        A new contiguous matrix.
    """
    count, columns, width = parts.shape
    out = empty(parts, (rank, columns) if transpose else (columns, rank), dtype=dtype)
    chosen, tile = config("reduce", dtype), rank_tile(rank, torch.float32)
    out_column, out_rank = reversed(out.stride()) if transpose else out.stride()
    launch(
        _reduce_kernel,
        (ceil_div(columns, chosen.columns), ceil_div(rank, tile)),
        parts,
        out,
        count,
        columns,
        rank,
        width,
        out_column,
        out_rank,
        scale,
        COLUMNS=chosen.columns,
        RANK=tile,
        **chosen.options,
    )
    return out
