"""LoRA on a GPU.

Forward is one pass over x and one over the base layer's output; backward stands in safe_kernels/triton/gradients.py.
Dropout's mask is made anew in every pass, and what is not wanted is neither allocated nor computed.
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
from safe_kernels.triton.sweep import _load_parts, sweep


@triton.jit
def _lora_apply_kernel(
    base,  # [rows, columns]
    lora_B,  # [columns, rank]
    h,  # [SPLITS, rows, width]
    out,  # [rows, columns], contiguous
    rows,
    columns,
    rank,
    width,
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
        left = _load_parts(h, row, r, rows, width, SPLITS).to(OPERAND)
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
        h.shape[2],
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
