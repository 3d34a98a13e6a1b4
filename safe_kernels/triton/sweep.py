"""One sweep over a matrix M [N, d]: its product with a narrow matrix, and its transpose's product with another.

Both of an adapter's large dimensions are swept this way::

    forward     M = x        product h = dropout(x) A'
    backward    M = grad     product grad B, and transposed product grad' h
                M = x        transposed product dropout(x)' (grad B), beside what safe_kernels/triton/lora.py adds

Sums over d are cut into `splits` parts and sums over N into tiles of rows; the parts lie in memory one by one and are
added in a fixed order, so that results do not depend on the order programs run in.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.configs import Config, config, rank_tile, splits
from safe_kernels.triton.launch import TYPES, Dropout, Product, ceil_div, tuned
from safe_kernels.triton.philox import _keep


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
def _lora_sweep_kernel(
    matrix,  # [rows, columns]
    narrow,  # [rank, columns]
    other,  # [OTHER_SPLITS, rows, rank]
    rng,
    product,  # [splits, rows, rank]
    transposed,  # [tiles of rows, columns, rank]
    rows,
    columns,
    rank,
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
    COMPUTE_PRODUCT: tl.constexpr,
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
    if COMPUTE_PRODUCT:
        total = tl.zeros([ROWS, RANK], tl.float32)
    if COMPUTE_TRANSPOSED:
        factor = _load_parts(other, row, r, rows, rank, OTHER_SPLITS).to(OPERAND)
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
        if COMPUTE_PRODUCT:
            weight = tl.load(
                narrow_rows + column.to(tl.int64)[:, None] * narrow_column,
                mask=column_inside[:, None] & r_inside[None, :],
                other=0.0,
            ).to(OPERAND)
            total = tl.dot(tile, weight, total, input_precision=PRECISION)
        if COMPUTE_TRANSPOSED:
            outer = tl.dot(tl.trans(tile), factor, input_precision=PRECISION)
            at = (tl.program_id(0).to(tl.int64) * columns + column)[:, None] * rank + r[None, :]
            tl.store(transposed + at, outer, mask=column_inside[:, None] & r_inside[None, :])
    if COMPUTE_PRODUCT:
        at = (part.to(tl.int64) * rows + row)[:, None] * rank + r[None, :]
        tl.store(product + at, total * product_scale, mask=row_inside[:, None] & r_inside[None, :])


@triton.jit
def _reduce_kernel(
    parts,  # [count, columns, rank]
    out,
    count,
    columns,
    rank,
    out_column,
    out_rank,
    scale,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.program_id(1) * RANK + tl.arange(0, RANK)
    inside = (column < columns)[:, None] & (r < rank)[None, :]
    at = column.to(tl.int64)[:, None] * rank + r[None, :]
    total = tl.zeros([COLUMNS, RANK], tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * columns * rank + at, mask=inside, other=0.0)
    to = out + column.to(tl.int64)[:, None] * out_column + r.to(tl.int64)[None, :] * out_rank
    tl.store(to, (total * scale).to(out.dtype.element_ty), mask=inside)


def sweep(
    matrix: Tensor,
    narrow: Tensor,
    arithmetic: Product,
    dropout: Dropout,
    scale: float = 1.0,
    other: Tensor | None = None,
    wants_product: bool = True,
) -> tuple[Tensor, Tensor]:
    """Launches the sweep.

    Args:
        matrix: [N, d], any strides.
        narrow: [r, d], any strides.
        arithmetic: how to multiply.
        dropout: drops elements of `matrix`, without making the rest grow.
        scale: what the product is multiplied by.
        other: [parts, N, r], the factor of the transposed product; None when that is not wanted.
        wants_product: whether the product is wanted.

    Returns:
        The product's parts [splits, N, r], and the transposed product's [tiles, d, r]; what is not wanted is empty.
    """
    name = "lora_sweep" if dropout.rng_state is None else "lora_sweep_dropped"
    run = partial(_sweep, matrix, narrow, arithmetic, dropout, scale, other, wants_product)
    flags = (wants_product and "product", other is not None and "transposed")
    return tuned(name, run, (*matrix.shape, narrow.shape[0]), arithmetic, matrix, *flags)


def _sweep(
    matrix: Tensor,
    narrow: Tensor,
    arithmetic: Product,
    dropout: Dropout,
    scale: float,
    other: Tensor | None,
    wants_product: bool,
    chosen: Config,
) -> tuple[Tensor, Tensor]:
    (rows, columns), rank = matrix.shape, narrow.shape[0]
    tiles, width = ceil_div(rows, chosen.rows), rank_tile(rank, arithmetic.operand)
    parts, split_columns = splits(tiles, columns, chosen.columns)
    empty = matrix.new_empty
    result = empty((parts, rows, rank) if wants_product else 0, dtype=torch.float32)
    outer = empty(0 if other is None else (tiles, columns, rank), dtype=torch.float32)
    _lora_sweep_kernel[(tiles, parts, ceil_div(rank, width))](
        matrix,
        narrow,
        other,
        dropout.rng_state,
        result,
        outer,
        rows,
        columns,
        rank,
        *matrix.stride(),
        *narrow.stride(),
        split_columns,
        scale,
        dropout.threshold,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        RANK=width,
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_DROPOUT=dropout.rng_state is not None,
        COMPUTE_PRODUCT=wants_product,
        COMPUTE_TRANSPOSED=other is not None,
        OTHER_SPLITS=1 if other is None else other.shape[0],
        **chosen.options,
    )
    return result, outer


def reduce(parts: Tensor, scale: float, dtype: torch.dtype, transpose: bool = False) -> Tensor:
    """Adds parts in their order.

    Args:
        parts: [count, d, r].
        scale: what the sum is multiplied by.
        dtype: dtype of the result.
        transpose: whether the result is [r, d] instead of [d, r].

    Returns:
        A new contiguous matrix.
    """
    count, columns, rank = parts.shape
    out = parts.new_empty((rank, columns) if transpose else (columns, rank), dtype=dtype)
    chosen, width = config("reduce", dtype), rank_tile(rank, torch.float32)
    out_column, out_rank = reversed(out.stride()) if transpose else out.stride()
    _reduce_kernel[(ceil_div(columns, chosen.columns), ceil_div(rank, width))](
        parts,
        out,
        count,
        columns,
        rank,
        out_column,
        out_rank,
        scale,
        COLUMNS=chosen.columns,
        RANK=width,
        **chosen.options,
    )
    return out
