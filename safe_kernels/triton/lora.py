"""LoRA on a GPU.

Forward is one pass over x and one over the base layer's output. Backward is in triton/lib/lora_gradients.py.
Every pass recomputes dropout's mask. Unwanted results are neither allocated nor computed.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.cka import block_sums
from safe_kernels.triton.lib.lora_gradients import adapter_gradients
from safe_kernels.triton.lib.skinny_matmul import _load_narrow, _load_parts, joined, sweep
from safe_kernels.triton.lib.terms import _factor, _multiply_narrow
from safe_kernels.triton.runtime.configs import Config, rank_tile, splits
from safe_kernels.triton.runtime.host import (
    TYPES,
    Product,
    adapter_product,
    dropout,
    flat,
    require_shape,
    served_by,
    tuned,
)
from safe_kernels.triton.runtime.launch_replay import empty, launch


@triton.jit
def _lora_apply_kernel(
    base,  # [M, N]
    bias,  # [N]
    lora_B,  # [N, R]
    h,  # [SPLITS, M, width]
    out,  # [M, N], contiguous
    M,
    N,
    R,
    width,
    stride_base_m,
    stride_base_n,
    stride_b_n,
    stride_b_r,
    split_n,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr,  # one tile holds the rank: h's parts are added once, not for every tile of columns
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, offs_m64 = (offs_m < M)[:, None], offs_m.to(tl.int64)[:, None]
    begin = tl.program_id(1) * split_n
    end = tl.minimum(begin + split_n, N)
    offs_r = tl.arange(0, BLOCK_R)
    if ONE_TILE:
        left = _factor(_load_parts(h, offs_m, offs_r, M, width, SPLITS), OPERAND, PRECISION)
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n, offs_n64 = (offs_n < end)[None, :], offs_n.to(tl.int64)[None, :]
        delta = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if ONE_TILE:
            right = _load_narrow(lora_B, offs_r, offs_n64, R, stride_b_r, stride_b_n, mask_n)
            delta = _multiply_narrow(left, _factor(right, OPERAND, PRECISION), delta, PRECISION)
        else:
            for start_r in range(0, R, BLOCK_R):
                offs = start_r + offs_r
                some = _factor(_load_parts(h, offs_m, offs, M, width, SPLITS), OPERAND, PRECISION)
                right = _load_narrow(lora_B, offs, offs_n64, R, stride_b_r, stride_b_n, mask_n)
                delta = _multiply_narrow(some, _factor(right, OPERAND, PRECISION), delta, PRECISION)
        mask = mask_m & mask_n
        after = delta * scale
        if base is not None:
            before = tl.load(base + offs_m64 * stride_base_m + offs_n64 * stride_base_n, mask=mask, other=0.0)
            after += before.to(tl.float32)
        if bias is not None:
            after += tl.load(bias + offs_n, mask=offs_n < end, other=0.0).to(tl.float32)[None, :]
        tl.store(out + offs_m64 * N + offs_n64, after.to(out.dtype.element_ty), mask=mask)


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
    drop = dropout(dropout_p, rng_state)
    require_shape("lora_A", lora_A, (lora_B.shape[1], x.shape[-1]))
    require_shape("base", base, (*x.shape[:-1], lora_B.shape[0]))
    h, _ = sweep(flat(x), lora_A, drop, scale=drop.scale)
    out = apply(base, None, base, lora_B, h, scaling, x.dtype)
    if block_starts is None:
        return out, empty(x, 0, dtype=torch.float64)
    return out, block_sums(flat(base), h, lora_B, scaling, block_starts, block_rows, row_weight)


def apply(
    base: Tensor | None,
    bias: Tensor | None,
    like: Tensor,
    lora_B: Tensor,
    h: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """``base + bias + scaling * h B'``; `like` gives the leading dimensions and the dtype of the result.

    `dtype` is that of the x from which h was made: a product of h has its precision.
    """
    N, R = lora_B.shape
    arithmetic = adapter_product("lora_apply", dtype, lora_B.dtype, R)
    is_one_tile = rank_tile(R, arithmetic.narrow, True) >= R
    factor = h if is_one_tile else joined(h, arithmetic.narrow)[None]
    run = partial(_apply, base, bias, like, lora_B, factor, scaling, arithmetic)
    flags = (base is None and "alone", bias is not None and "bias")
    return tuned("lora_apply", run, (h.shape[1], N, R), arithmetic, like, *flags)


def _apply(
    base: Tensor | None,
    bias: Tensor | None,
    like: Tensor,
    lora_B: Tensor,
    h: Tensor,
    scaling: float,
    arithmetic: Product,
    chosen: Config,
) -> Tensor:
    (N, R), M = lora_B.shape, h.shape[1]
    out = empty(like, (*like.shape[:-1], N))
    matrix = None if base is None else flat(base)
    block_r, tiles = rank_tile(R, arithmetic.narrow, True), triton.cdiv(M, chosen.block_m)
    parts, split_n = splits(tiles, N, chosen.block_n, chosen.slots)
    launch(
        _lora_apply_kernel,
        (tiles, parts),
        matrix,
        None if bias is None else bias.contiguous(),
        lora_B,
        h,
        out,
        M,
        N,
        R,
        h.shape[2],
        *((1, 1) if matrix is None else matrix.stride()),
        *lora_B.stride(),
        split_n,
        scaling,
        BLOCK_R=block_r,
        SPLITS=h.shape[0],
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        ONE_TILE=block_r >= R,
        **chosen.constants,
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
    wants_x, wants_A, wants_B = output_mask
    wanted = (wants_x, wants_A and x is not None, wants_B and x is not None)
    require_shape("lora_B", lora_B, (grad.shape[-1], lora_A.shape[0]))
    if x is not None:
        require_shape("x", x, (*grad.shape[:-1], lora_A.shape[1]))
    drop = dropout(dropout_p, rng_state)
    _, grad_x, grad_A, grad_B = adapter_gradients(grad, x, lora_A, lora_B, scaling, drop, wanted)
    return grad_x, grad_A, grad_B
