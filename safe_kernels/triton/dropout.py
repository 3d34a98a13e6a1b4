"""Dropout by itself on a GPU; its backward is the same call on the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.elementwise import _dropped, _read, _tile, _write
from safe_kernels.triton.runtime import host
from safe_kernels.triton.runtime.launch_replay import empty


@triton.jit
def _dropout_kernel(
    x,
    out,
    rng,
    rows,
    columns,
    x_row,
    x_column,
    dropout_scale,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    row, first, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    values = _read(x, row, column, x_row, x_column, inside)
    values = _dropped(values, rng, row, first, threshold, dropout_scale, HAS_DROPOUT)
    _write(out, row, column, columns, values, inside)


@host.served_by(reference.dropout)
def dropout(x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
    """See `safe_kernels.reference.dropout`."""
    out = empty(x, x.shape)
    host.elementwise(_dropout_kernel, [x], [out], host.dropout(dropout_p, rng_state))
    return out
