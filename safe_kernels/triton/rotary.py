"""Rotary position embedding on a GPU: each element is read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.runtime import configs, host
from safe_kernels.triton.runtime.launch_replay import empty, launch


@triton.jit
def _rotary_kernel(
    x,
    cos,
    sin,
    out,
    heads,
    N,
    R,
    tokens,
    cos_rows,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_x_n,
    stride_cos_m,
    stride_cos_n,
    stride_sin_m,
    stride_sin_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """A tile has some heads of one token, whose cosines and sines are read once."""
    half = R // 2
    across, down = tl.maximum(tl.cdiv(half, BLOCK_N), 1), tl.cdiv(heads, BLOCK_M)
    at = (tl.program_id(0) // (across * down)).to(tl.int64)
    offs_m = tl.program_id(0) // across % down * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(0) % across * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    is_pair, is_head = offs_n < half, (offs_m < heads)[:, None]
    mask = is_head & is_pair[None, :]
    rows = x + at // tokens * stride_x_b + at % tokens * stride_x_t + offs_m.to(tl.int64)[:, None] * stride_x_h
    rows_out = out + (at * heads + offs_m[:, None]) * N
    first = tl.load(rows + offs_n[None, :] * stride_x_n, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(rows + (half + offs_n)[None, :] * stride_x_n, mask=mask, other=0.0).to(tl.float32)
    row_cos, row_sin = cos + at % cos_rows * stride_cos_m, sin + at % cos_rows * stride_sin_m
    cos_first = tl.load(row_cos + offs_n * stride_cos_n, mask=is_pair, other=0.0).to(tl.float32)
    cos_second = tl.load(row_cos + (half + offs_n) * stride_cos_n, mask=is_pair, other=0.0).to(tl.float32)
    sin_first = tl.load(row_sin + offs_n * stride_sin_n, mask=is_pair, other=0.0).to(tl.float32)
    sin_second = tl.load(row_sin + (half + offs_n) * stride_sin_n, mask=is_pair, other=0.0).to(tl.float32)
    if TRANSPOSED:
        sin_first, sin_second = -sin_second, -sin_first
    turned_first = first * cos_first[None, :] - second * sin_first[None, :]
    turned_second = second * cos_second[None, :] + first * sin_second[None, :]
    tl.store(rows_out + offs_n[None, :], turned_first.to(out.dtype.element_ty), mask=mask)
    tl.store(rows_out + (half + offs_n)[None, :], turned_second.to(out.dtype.element_ty), mask=mask)
    if HAS_REST:
        for start in range(R + start_n, N, across * BLOCK_N):
            offs_rest = start + tl.arange(0, BLOCK_N)
            is_rest = is_head & (offs_rest < N)[None, :]
            rest = tl.load(rows + offs_rest[None, :] * stride_x_n, mask=is_rest)
            tl.store(rows_out + offs_rest[None, :], rest, mask=is_rest)


@host.served_by(reference.rotary)
def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    batch, tokens, heads, N = x.shape
    shape = (batch if cos.shape[0] == batch else 1, tokens, min(cos.shape[-1], N) // 2 * 2)
    host.require_shape("cos", cos, shape)
    host.require_shape("sin", sin, shape)
    out, by_cos, by_sin = empty(x, x.shape), host.flat(cos), host.flat(sin)
    half = max(1, shape[-1] // 2)
    chosen = configs.elementwise_config(half)
    block_m = min(chosen.block_m, triton.next_power_of_2(heads))
    warps = min(max(1, block_m * chosen.block_n // 256), chosen.warps)  # 8 elements per thread, twice
    launch(
        _rotary_kernel,
        (batch * tokens * triton.cdiv(heads, block_m) * triton.cdiv(half, chosen.block_n),),
        *(x, by_cos, by_sin, out, heads, N, shape[-1], tokens, by_cos.shape[0]),
        *(*x.stride(), *by_cos.stride(), *by_sin.stride()),
        TRANSPOSED=transposed,
        HAS_REST=shape[-1] < N,
        **{**chosen.constants, "BLOCK_M": block_m, "num_warps": warps},
    )
    return out
