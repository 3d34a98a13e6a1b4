"""A linear layer and its LoRA adapter in one product of matrices on a GPU.

A tile of the output begins as the rank-r product, is multiplied by dropout's mask where that belongs to it (backward),
and then sums up the large product, so that no second tile has to be held and the layer's output without the adapter
never exists. Forward and backward are one kernel::

    forward     out    = (h) B' + x W' + bias                      h = scaling * dropout(x) A'
    backward    grad_x = mask * (grad_h) A / (1 - p) + grad W      grad_h = scaling * grad B
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.cka import block_sums
from safe_kernels.triton.configs import Config, rank_tile
from safe_kernels.triton.gradients import adapter_gradients
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
from safe_kernels.triton.plans import empty, launch
from safe_kernels.triton.sweep import _load_narrow, _load_parts, sweep


@triton.jit
def _lora_linear_kernel(
    left,  # [rows, inner]
    right,  # [inner, columns]
    bias,  # [columns]
    narrow_left,  # [SPLITS, rows, width]
    narrow_right,  # [rank, columns]
    rng,
    out,  # [rows, columns], contiguous
    rows,
    columns,
    inner,
    rank,
    width,
    left_row,
    left_inner,
    right_inner,
    right_column,
    narrow_rank,
    narrow_column,
    scale,
    dropout_scale,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    ONE_TILE: tl.constexpr,  # of the rank: then there is no loop, around which wgmma would wait
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # Programs that run at the same time share rows and columns: GROUP tiles of rows by all of the columns.
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    row = (group * GROUP + within % height) * ROWS + tl.arange(0, ROWS)
    first_column = within // height * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    row_inside, column_inside = (row < rows)[:, None], (column < columns)[None, :]
    long_row, long_column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    r = tl.arange(0, RANK)
    if ONE_TILE:
        thin = (_load_parts(narrow_left, row, r, rows, width, SPLITS) * scale).to(OPERAND)
        short = _load_narrow(narrow_right, r, long_column, rank, narrow_rank, narrow_column, column_inside).to(OPERAND)
        total = tl.dot(thin, short, total, input_precision=PRECISION)
    else:
        for first in range(0, rank, RANK):
            thin = (_load_parts(narrow_left, row, first + r, rows, width, SPLITS) * scale).to(OPERAND)
            short = _load_narrow(narrow_right, first + r, long_column, rank, narrow_rank, narrow_column, column_inside)
            total = tl.dot(thin, short.to(OPERAND), total, input_precision=PRECISION)
    if HAS_DROPOUT:
        total *= _keep(rng, row, first_column, threshold, COLUMNS).to(tl.float32) * dropout_scale
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    k = tl.arange(0, INNER)
    left_at = left + long_row * left_row + k.to(tl.int64)[None, :] * left_inner
    right_at = right + k.to(tl.int64)[:, None] * right_inner + long_column * right_column
    for first in range(0, inner, INNER):
        k_inside = first + k < inner
        a = tl.load(left_at, mask=row_inside & k_inside[None, :], other=0.0).to(OPERAND)
        b = tl.load(right_at, mask=k_inside[:, None] & column_inside, other=0.0).to(OPERAND)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_at += INNER * left_inner
        right_at += INNER * right_inner
    tl.store(out + long_row * columns + long_column, total.to(out.dtype.element_ty), mask=row_inside & column_inside)


@served_by(reference.lora_linear)
def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_starts: Tensor | None = None,
    block_rows: int = 0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `safe_kernels.reference.lora_linear`."""
    drop, rows = dropout(dropout_p, rng_state), flat(x)
    require_shape("lora_A", lora_A, (lora_B.shape[1], rows.shape[1]))
    require_shape("weight", weight, (lora_B.shape[0], rows.shape[1]))
    if bias is not None:
        require_shape("bias", bias, lora_B.shape[:1])
    with guard(x):
        h, _ = sweep(rows, lora_A, product(x.dtype, lora_A.dtype), drop, scale=drop.scale)
        out = _multiply(x, weight.t(), bias, h, lora_B.t(), dropout(0.0, None), scaling)
        if block_starts is None:
            return out, empty(x, 0, dtype=torch.float64)
        # The features without the adapter are nowhere: those with it are scored, with the roles swapped.
        return out, block_sums(flat(out), h, lora_B, scaling, block_starts, block_rows, row_weight, swapped=True)


@served_by(reference.lora_linear_backward)
def lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `safe_kernels.reference.lora_linear_backward`."""
    wants_x, wants_weight, wants_bias, wants_A, wants_B = output_mask
    drop, rows = dropout(dropout_p, rng_state), flat(grad)
    require_shape("grad", rows, (rows.shape[0], lora_B.shape[0]))
    require_shape("weight", weight, (lora_B.shape[0], lora_A.shape[1]))
    grad_x, grad_weight, grad_bias = empty(weight, 0), empty(weight, 0), empty(weight, 0)
    with guard(grad):
        wanted = (False, wants_A, wants_B)
        grad_h, _, grad_A, grad_B = adapter_gradients(grad, x, lora_A, lora_B, scaling, drop, wanted, wants_x)
        if wants_x:
            grad_x = _multiply(grad, weight, None, grad_h, lora_A, drop, 1.0)
        if wants_weight and x is not None:
            grad_weight = rows.t().to(weight.dtype) @ flat(x)
        if wants_bias:
            grad_bias = rows.sum(0, dtype=torch.float32).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_A, grad_B


def _multiply(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    narrow_left: Tensor,
    narrow_right: Tensor,
    drop: Dropout,
    scale: float,
) -> Tensor:
    """``left right + bias + mask * scale * narrow_left narrow_right``; left [..., inner], right [inner, columns]."""
    # A float32 adapter over a half-precision layer is rounded here: the result has no more digits.
    arithmetic = product(left.dtype, right.dtype)
    run = partial(_multiply_by, left, right, bias, narrow_left, narrow_right, drop, scale, arithmetic)
    size = (narrow_left.shape[1], right.shape[1], right.shape[0], narrow_right.shape[0])
    flags = (bias is not None and "bias", drop.rng_state is not None and "dropout", right.stride(0) == 1 and "column")
    return tuned("lora_linear", run, size, arithmetic, left, *flags)


def _multiply_by(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    narrow_left: Tensor,
    narrow_right: Tensor,
    drop: Dropout,
    scale: float,
    arithmetic: Product,
    chosen: Config,
) -> Tensor:
    out, matrix = empty(right, (*left.shape[:-1], right.shape[1])), flat(left)
    (rows, inner), columns, rank = matrix.shape, right.shape[1], narrow_right.shape[0]
    tile = rank_tile(rank, arithmetic.operand)
    launch(
        _lora_linear_kernel,
        (ceil_div(rows, chosen.rows) * ceil_div(columns, chosen.columns),),
        matrix,
        right,
        None if bias is None else bias.contiguous(),
        narrow_left,
        narrow_right,
        drop.rng_state,
        out,
        rows,
        columns,
        inner,
        rank,
        narrow_left.shape[2],
        *matrix.stride(),
        *right.stride(),
        *narrow_right.stride(),
        scale,
        drop.scale,
        drop.threshold,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        INNER=chosen.inner,
        RANK=tile,
        ONE_TILE=rank <= tile,
        GROUP=8,
        SPLITS=narrow_left.shape[0],
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=drop.rng_state is not None,
        **chosen.options,
    )
    return out
