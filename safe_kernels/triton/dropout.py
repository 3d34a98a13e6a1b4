"""Dropout alone on a GPU; backward is the same call on the gradient."""

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
    M,
    N,
    stride_x_m,
    stride_x_n,
    dropout_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    offs_m, start_n, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    values = _read(x, offs_m, offs_n, stride_x_m, stride_x_n, mask)
    values = _dropped(values, rng, offs_m, start_n, threshold, dropout_scale, HAS_DROPOUT)
    _write(out, offs_m, offs_n, N, values, mask)


@host.served_by(reference.dropout)
def dropout(x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
    out = empty(x, x.shape)
    host.elementwise(_dropout_kernel, [x], [out], host.dropout(dropout_p, rng_state))
    return out
