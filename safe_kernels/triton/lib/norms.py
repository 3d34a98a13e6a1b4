"""The kernels of `rms_norm` and `layer_norm`, which differ in the mean and the bias alone.

A program holds whole rows in registers, so that each tensor is read once and written once; rows too long for that go to
the reference. Backward makes the normalised row from the input, or from the output where that is what is retained.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.runtime.configs import row_config
from safe_kernels.triton.runtime.host import ceil_div, flat, guard, require_shape
from safe_kernels.triton.runtime.launch_replay import empty, launch

LONGEST = 8192
"""Elements of the longest row that registers hold."""


@triton.jit
def _affine(weight, bias, column, columns, offset, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The row that normalised rows are multiplied by, and the one that is added, in float32."""
    scale = tl.full(column.shape, 1.0, tl.float32)
    shift = tl.zeros(column.shape, tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight + column, mask=column < columns, other=1.0).to(tl.float32) + offset
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _norm_forward_kernel(
    x,  # [rows, columns]
    weight,
    bias,
    out,  # [rows, columns], contiguous
    mean,  # [rows]
    rstd,  # [rows]
    rows,
    columns,
    x_row,
    x_column,
    eps,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    scale, shift = _affine(weight, bias, column, columns, offset, HAS_WEIGHT, HAS_BIAS)
    long_row = row.to(tl.int64)[:, None]
    at = x + long_row * x_row + column.to(tl.int64)[None, :] * x_column
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        middle = tl.sum(values, axis=1) / columns
        values = tl.where(inside, values - middle[:, None], 0.0)
        tl.store(mean + row, middle, mask=row < rows)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / columns + eps)
    tl.store(rstd + row, inverse, mask=row < rows)
    result = values * inverse[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + long_row * columns + column[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    grad,  # [rows, columns]
    retained,  # [rows, columns]
    weight,
    bias,
    mean,  # [rows]
    rstd,  # [rows]
    grad_x,  # [rows, columns], contiguous
    partial,  # [2, programs, columns]: of the gradients of weight and bias
    rows,
    columns,
    grad_row,
    grad_column,
    retained_row,
    retained_column,
    rows_each,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    COMPUTE_X: tl.constexpr,
    COMPUTE_WEIGHT: tl.constexpr,
    COMPUTE_BIAS: tl.constexpr,
):
    begin = tl.program_id(0) * rows_each
    end = tl.minimum(begin + rows_each, rows)
    column = tl.arange(0, COLUMNS)
    long_column = column.to(tl.int64)[None, :]
    scale, shift = _affine(weight, bias, column, columns, offset, HAS_WEIGHT, HAS_BIAS)
    weights = tl.zeros([COLUMNS], tl.float32)
    biases = tl.zeros([COLUMNS], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < columns)[None, :]
        long_row = row.to(tl.int64)[:, None]
        g = tl.load(grad + long_row * grad_row + long_column * grad_column, mask=inside, other=0.0).to(tl.float32)
        normal = tl.load(retained + long_row * retained_row + long_column * retained_column, mask=inside, other=0.0)
        normal = normal.to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        if FROM_OUTPUT:
            normal = (normal - shift[None, :]) / scale[None, :]
        else:
            if CENTRED:
                normal -= tl.load(mean + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
            normal *= inverse
        normal = tl.where(inside, normal, 0.0)
        if COMPUTE_WEIGHT:
            weights += tl.sum(g * normal, axis=0)
        if COMPUTE_BIAS:
            biases += tl.sum(g, axis=0)
        if COMPUTE_X:
            g *= scale[None, :]
            rest = normal * (tl.sum(g * normal, axis=1) / columns)[:, None]
            if CENTRED:
                rest += (tl.sum(g, axis=1) / columns)[:, None]
            result = inverse * (g - rest)
            tl.store(grad_x + long_row * columns + long_column, result.to(grad_x.dtype.element_ty), mask=inside)
    to = partial + tl.cast(tl.program_id(0), tl.int64) * columns + column
    if COMPUTE_WEIGHT:
        tl.store(to, weights, mask=column < columns)
    if COMPUTE_BIAS:
        tl.store(to + tl.cast(tl.num_programs(0), tl.int64) * columns, biases, mask=column < columns)


class Affine(NamedTuple):
    """What follows the normalisation."""

    weight: Tensor | None
    bias: Tensor | None
    offset: float


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check(x: Tensor, affine: Affine) -> None:
    for name, tensor in (("weight", affine.weight), ("bias", affine.bias)):
        if tensor is not None:
            require_shape(name, tensor, (x.shape[-1],))


def norm_forward(x: Tensor, affine: Affine, eps: float, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises the rows of x.

    Args:
        x: [..., d], d at most `LONGEST`.
        affine: weight and bias.
        eps: added to the mean of the squares.
        centred: whether the mean is taken away first.

    Returns:
        out, mean (empty unless `centred`) and rstd.
    """
    _check(x, affine)
    rows = flat(x)
    out = empty(x, x.shape)
    mean, rstd = (empty(x, x.shape[:-1] if wanted else 0, dtype=torch.float32) for wanted in (centred, True))
    chosen = row_config(rows.shape[1])
    with guard(x):
        launch(
            _norm_forward_kernel,
            (ceil_div(rows.shape[0], chosen.rows),),
            rows,
            _contiguous(affine.weight),
            _contiguous(affine.bias),
            out,
            mean,
            rstd,
            *rows.shape,
            *rows.stride(),
            eps,
            affine.offset,
            ROWS=chosen.rows,
            COLUMNS=chosen.columns,
            CENTRED=centred,
            HAS_WEIGHT=affine.weight is not None,
            HAS_BIAS=affine.bias is not None,
            **chosen.options,
        )
    return out, mean, rstd


def norm_backward(
    grad: Tensor,
    retained: Tensor,
    affine: Affine,
    statistics: tuple[Tensor | None, Tensor],
    centred: bool,
    from_output: bool,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `norm_forward`.

    Args:
        grad: [..., d].
        retained: [..., d], the output if `from_output`, else x.
        affine: weight and bias.
        statistics: mean, which is not read if `from_output`, and rstd.
        centred: as forward.
        from_output: what `retained` is.
        wanted: which of the gradients of x, weight and bias.

    Returns:
        The gradients of x (empty if not wanted), weight and bias (float32 [d], or None).
    """
    _check(retained, affine)
    require_shape("grad", grad, tuple(retained.shape))
    rows, grads = flat(retained), flat(grad)
    (count, columns), chosen = rows.shape, row_config(rows.shape[1])
    wants_x, wants_weight, wants_bias = wanted
    sums = wants_weight or wants_bias
    # Sums over rows want few programs; without them a program a tile of rows is simplest.
    rows_each = max(chosen.rows, ceil_div(ceil_div(count, 512), chosen.rows) * chosen.rows) if sums else chosen.rows
    programs = ceil_div(count, rows_each)
    grad_x = empty(retained, retained.shape if wants_x else 0)
    partial = empty(retained, (2, programs, columns) if sums else 0, dtype=torch.float32)
    mean, rstd = statistics
    flags: dict[str, Any] = {"COMPUTE_X": wants_x, "COMPUTE_WEIGHT": wants_weight, "COMPUTE_BIAS": wants_bias}
    with guard(grad):
        launch(
            _norm_backward_kernel,
            (programs,),
            grads,
            rows,
            _contiguous(affine.weight),
            _contiguous(affine.bias),
            _contiguous(mean),
            rstd.contiguous(),
            grad_x,
            partial,
            count,
            columns,
            *grads.stride(),
            *rows.stride(),
            rows_each,
            affine.offset,
            ROWS=chosen.rows,
            COLUMNS=chosen.columns,
            CENTRED=centred,
            HAS_WEIGHT=affine.weight is not None,
            HAS_BIAS=affine.bias is not None,
            FROM_OUTPUT=from_output,
            **flags,
            **chosen.options,
        )
    return grad_x, partial[0].sum(0) if wants_weight else None, partial[1].sum(0) if wants_bias else None
