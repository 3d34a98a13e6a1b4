"""LoRA on a GPU.

Forward is one pass over x and one over the base layer's output. Backward is one pass over grad, and what the gradients
of x and lora_A need in one more over x. Dropout's mask is made anew in every pass, and what is not wanted is neither
allocated nor computed.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.cka import block_sums
from safe_kernels.triton.configs import Config, rank_tile, splits
from safe_kernels.triton.launch import (
    TYPES,
    Dropout,
    Product,
    ceil_div,
    dropout,
    flat,
    guard,
    product,
    require_shape,
    served_by,
    tuned,
)
from safe_kernels.triton.philox import _keep
from safe_kernels.triton.sweep import _load_parts, reduce, sweep


@triton.jit
def _lora_apply_kernel(
    base,  # [rows, columns]
    lora_B,  # [columns, rank]
    h,  # [SPLITS, rows, rank]
    out,  # [rows, columns], contiguous
    rows,
    columns,
    rank,
    base_row,
    base_column,
    b_column,
    b_rank,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    delta = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rank, RANK):
        r = first + tl.arange(0, RANK)
        left = _load_parts(h, row, r, rows, rank, SPLITS).to(OPERAND)
        right = tl.load(
            lora_B + r.to(tl.int64)[:, None] * b_rank + column.to(tl.int64)[None, :] * b_column,
            mask=(r < rank)[:, None] & (column < columns)[None, :],
            other=0.0,
        ).to(OPERAND)
        delta = tl.dot(left, right, delta, input_precision=PRECISION)
    row, column = row.to(tl.int64), column.to(tl.int64)
    before = tl.load(base + row[:, None] * base_row + column[None, :] * base_column, mask=inside, other=0.0)
    after = before.to(tl.float32) + delta * scale
    tl.store(out + row[:, None] * columns + column[None, :], after.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _lora_input_kernel(
    x,  # [rows, columns]
    lora_A,  # [rank, columns]
    grad_h,  # [SPLITS, rows, rank]
    rng,
    grad_x,  # [rows, columns], contiguous
    partial,  # [tiles of rows, columns, rank]
    rows,
    columns,
    rank,
    x_row,
    x_column,
    a_rank,
    a_column,
    split_columns,
    dropout_scale,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    COMPUTE_X: tl.constexpr,
    COMPUTE_A: tl.constexpr,
    ONE_TILE: tl.constexpr,  # of the rank: then it is read once, and not for every tile of columns
):
    """The gradients that meet at x: of x itself, and of lora_A; one sweep, one mask."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * split_columns
    end = tl.minimum(begin + split_columns, columns)
    row_inside, long_row = row < rows, row.to(tl.int64)
    if ONE_TILE:
        left = _load_parts(grad_h, row, tl.arange(0, RANK), rows, rank, SPLITS).to(OPERAND)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_inside, long_column = column < end, column.to(tl.int64)
        inside = row_inside[:, None] & column_inside[None, :]
        if HAS_DROPOUT:
            keep = _keep(rng, row, first, threshold, COLUMNS)
        if COMPUTE_A:
            tile = tl.load(x + long_row[:, None] * x_row + long_column[None, :] * x_column, mask=inside, other=0.0)
            tile = tile.to(OPERAND)
            if HAS_DROPOUT:
                tile = tile * keep.to(OPERAND)
        if COMPUTE_X:
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first_r in range(0, rank, RANK):
            r = first_r + tl.arange(0, RANK)
            if not ONE_TILE:
                left = _load_parts(grad_h, row, r, rows, rank, SPLITS).to(OPERAND)
            if COMPUTE_X:
                right = tl.load(
                    lora_A + r.to(tl.int64)[:, None] * a_rank + long_column[None, :] * a_column,
                    mask=(r < rank)[:, None] & column_inside[None, :],
                    other=0.0,
                ).to(OPERAND)
                total = tl.dot(left, right, total, input_precision=PRECISION)
            if COMPUTE_A:
                outer = tl.dot(tl.trans(tile), left, input_precision=PRECISION)
                at = (tl.program_id(0).to(tl.int64) * columns + column)[:, None] * rank + r[None, :]
                tl.store(partial + at, outer, mask=column_inside[:, None] & (r < rank)[None, :])
        if COMPUTE_X:
            if HAS_DROPOUT:
                total = total * keep.to(tl.float32) * dropout_scale
            tl.store(
                grad_x + long_row[:, None] * columns + long_column[None, :],
                total.to(grad_x.dtype.element_ty),
                mask=inside,
            )


@served_by(reference.lora)
def lora(
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_starts: Tensor | None = None,
    block_rows: int = 0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `safe_kernels.reference.lora`."""
    drop, arithmetic = dropout(dropout_p, rng_state), product(x.dtype, lora_A.dtype)
    require_shape("lora_A", lora_A, (lora_B.shape[1], x.shape[-1]))
    require_shape("base", base, (*x.shape[:-1], lora_B.shape[0]))
    base_rows = flat(base)
    with guard(x):
        h, _ = sweep(flat(x), lora_A, arithmetic, drop, scale=drop.scale)
        apply = partial(_apply, base, lora_B, h, scaling, arithmetic)
        out = tuned("lora_apply", apply, (*base_rows.shape, lora_B.shape[1]), arithmetic, base)
        if block_starts is None:
            return out, x.new_empty(0, dtype=torch.float64)
        return out, block_sums(base_rows, h, lora_B, scaling, block_starts, block_rows, row_weight)


def _apply(base: Tensor, lora_B: Tensor, h: Tensor, scaling: float, arithmetic: Product, chosen: Config) -> Tensor:
    out, matrix = base.new_empty(base.shape), flat(base)
    (rows, columns), rank = matrix.shape, lora_B.shape[1]
    _lora_apply_kernel[(ceil_div(rows, chosen.rows), ceil_div(columns, chosen.columns))](
        matrix,
        lora_B,
        h,
        out,
        rows,
        columns,
        rank,
        *matrix.stride(),
        *lora_B.stride(),
        scaling,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        RANK=rank_tile(rank, arithmetic.operand),
        SPLITS=h.shape[0],
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        **chosen.options,
    )
    return out


@served_by(reference.lora_backward)
def lora_backward(
    grad: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `safe_kernels.reference.lora_backward`."""
    wants_x, wants_A, wants_B = output_mask
    wanted = (wants_x, wants_A and x is not None, wants_B and x is not None)
    require_shape("lora_B", lora_B, (grad.shape[-1], lora_A.shape[0]))
    if x is not None:
        require_shape("x", x, (*grad.shape[:-1], lora_A.shape[1]))
    with guard(grad):
        drop = dropout(dropout_p, rng_state)
        _, grad_x, grad_A, grad_B = adapter_gradients(grad, x, lora_A, lora_B, scaling, drop, wanted)
    return grad_x, grad_A, grad_B


def adapter_gradients(
    grad: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    drop: Dropout,
    wanted: tuple[bool, bool, bool],
    wants_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the adapter's part.

    Args:
        grad: [..., d_out].
        x: [..., d_in]; needed for the gradients of lora_A and lora_B.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        scaling: as in `lora`.
        drop: dropout's numbers.
        wanted: which of the gradients of x, lora_A and lora_B.
        wants_h: whether that of h is wanted by itself.

    Returns:
        The gradient of h = dropout(x) A' in parts [splits, N, r], those of x, lora_A and lora_B; what is not wanted is
        empty.
    """
    wants_x, wants_A, wants_B = wanted
    grad_x, grad_A, grad_B = (like.new_empty(0) for like in (grad if x is None else x, lora_A, lora_B))
    h = grad_h = None
    if x is not None and wants_B:
        h, _ = sweep(flat(x), lora_A, product(x.dtype, lora_A.dtype), drop, drop.scale)
    wants_h = wants_h or wants_x or wants_A
    if wants_h or h is not None:
        arithmetic, none = product(grad.dtype, lora_B.dtype), dropout(0.0, None)
        grad_h, parts = sweep(flat(grad), lora_B.t(), arithmetic, none, scaling, h, wants_h)
        if h is not None:
            grad_B = reduce(parts, scaling, lora_B.dtype)
    if grad_h is not None and (wants_x or wants_A):
        like = grad if x is None else x
        arithmetic = product(like.dtype, lora_A.dtype)
        run = partial(_input_gradients, grad, x, lora_A, grad_h, drop, wants_x, wants_A, arithmetic)
        flags = (wants_x and "x", wants_A and "A", drop.rng_state is not None and "dropout")
        size = (grad_h.shape[1], lora_A.shape[1], lora_A.shape[0])
        grad_x, parts = tuned("lora_input", run, size, arithmetic, like, *flags)
        if wants_A:
            grad_A = reduce(parts, drop.scale, lora_A.dtype, transpose=True)
    return grad.new_empty(0) if grad_h is None else grad_h, grad_x, grad_A, grad_B


def _input_gradients(
    grad: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    grad_h: Tensor,
    drop: Dropout,
    wants_x: bool,
    wants_A: bool,
    arithmetic: Product,
    chosen: Config,
) -> tuple[Tensor, Tensor]:
    """grad_x, and the parts [tiles, d_in, r] of grad_A; what is not wanted is empty."""
    (rank, columns), rows, like = lora_A.shape, grad_h.shape[1], grad if x is None else x
    tiles = ceil_div(rows, chosen.rows)
    parts, split_columns = splits(tiles, columns, chosen.columns)
    grad_x = like.new_empty((*grad.shape[:-1], columns) if wants_x else 0)
    partial = grad_h.new_empty((tiles, columns, rank) if wants_A else 0)
    x_rows = flat(x) if x is not None and wants_A else lora_A
    _lora_input_kernel[(tiles, parts)](
        x_rows,
        lora_A,
        grad_h,
        drop.rng_state,
        grad_x,
        partial,
        rows,
        columns,
        rank,
        *x_rows.stride(),
        *lora_A.stride(),
        split_columns,
        drop.scale,
        drop.threshold,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        RANK=rank_tile(rank, arithmetic.operand),
        SPLITS=grad_h.shape[0],
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_DROPOUT=drop.rng_state is not None,
        COMPUTE_X=wants_x,
        COMPUTE_A=wants_A,
        ONE_TILE=rank <= rank_tile(rank, arithmetic.operand),
        **chosen.options,
    )
    return grad_x, partial
