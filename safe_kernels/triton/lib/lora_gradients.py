"""The gradients of an adapter on a GPU: one pass over x, and at most two over grad.

The gradient of a factor is a sum over all rows. A program holds a tile of columns and walks down a group of rows, so
that the sum stays in registers. It writes one [N, R] per group, which is small compared with the matrix that it reads.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.lib.philox import _keep, _rng_words
from safe_kernels.triton.lib.skinny_matmul import Sum, _load_narrow, _load_parts, joined, joining, reduce, sweep
from safe_kernels.triton.lib.terms import _factor, _multiply, _multiply_narrow, _no_sums, _total
from safe_kernels.triton.runtime.configs import PARTS, Config, rank_tile, splits
from safe_kernels.triton.runtime.host import TYPES, Dropout, Product, adapter_product, flat, tuned
from safe_kernels.triton.runtime.launch_replay import empty, launch

SMALL = 2**20
"""Elements of all groups' sums that any call may have."""
NOTHING_DROPPED = Dropout(None, 0, 1.0)


@triton.jit
def _lora_input_kernel(
    x,  # [M, N]
    lora_A,  # [R, N]
    grad_h,  # [M, width]
    rng,
    grad_x,  # [M, N], contiguous
    partial,  # [groups of rows, N, width]
    M,
    N,
    R,
    width,
    stride_x_m,
    stride_x_n,
    stride_a_r,
    stride_a_n,
    group_m,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    COMPUTE_X: tl.constexpr,
    COMPUTE_A: tl.constexpr,
    ONE_TILE: tl.constexpr,  # one tile holds the rank: lora_A is read once, not for every tile of rows
):
    """The gradients of x and of lora_A: both read x's rows and use its dropout mask, so one pass makes both."""
    start_n = tl.program_id(0) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n, offs_n64 = (offs_n < N)[None, :], offs_n.to(tl.int64)[None, :]
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(1) * group_m
    end = tl.minimum(begin + group_m, M)
    # If the rank has several tiles, each has a program; the first one makes grad_x from all tiles, the others skip it.
    first_r, end_x = tl.program_id(2) * R, end - tl.program_id(2) * M
    if COMPUTE_A:
        sums_A = _no_sums(BLOCK_N, BLOCK_R, PRECISION)
    if COMPUTE_X and ONE_TILE:
        right = _load_narrow(lora_A, offs_r, offs_n64, R, stride_a_r, stride_a_n, mask_n)
        right = _factor(right, OPERAND, PRECISION)
    if HAS_DROPOUT:
        words = _rng_words(rng)
    for start_m in range(begin, end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m, offs_m64 = offs_m < end, offs_m.to(tl.int64)
        mask = mask_m[:, None] & mask_n
        left = _factor(_load_parts(grad_h, offs_m, offs_r, end, width, 1), OPERAND, PRECISION)
        if HAS_DROPOUT:  # chosen, not converted: fewer registers
            keep = tl.where(_keep(words, offs_m, start_n, threshold, BLOCK_N), 1.0, 0.0).to(OPERAND)
        if COMPUTE_A:
            tile = tl.load(x + offs_m64[:, None] * stride_x_m + offs_n64 * stride_x_n, mask=mask, other=0.0)
            tile = tile.to(OPERAND)
            if HAS_DROPOUT:
                tile = tile * keep
            sums_A = _multiply(tl.trans(tile), left, sums_A, PRECISION)
        if COMPUTE_X:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if ONE_TILE:
                acc = _multiply_narrow(left, right, acc, PRECISION)
            else:
                for start_r in range(first_r, R, BLOCK_R):
                    offs = start_r + tl.arange(0, BLOCK_R)
                    some = _factor(_load_parts(grad_h, offs_m, offs, end, width, 1), OPERAND, PRECISION)
                    right = _load_narrow(lora_A, offs, offs_n64, R, stride_a_r, stride_a_n, mask_n)
                    acc = _multiply_narrow(some, _factor(right, OPERAND, PRECISION), acc, PRECISION)
            if HAS_DROPOUT:
                if grad_x.dtype.element_ty == tl.float16:  # may overflow where the mask drops
                    acc = acc * keep.to(tl.float32)
                else:  # in the dtype of x: one mask for both
                    acc = acc.to(grad_x.dtype.element_ty) * keep.to(grad_x.dtype.element_ty)
            tl.store(
                grad_x + offs_m64[:, None] * N + offs_n64,
                acc.to(grad_x.dtype.element_ty),
                mask=(offs_m < end_x)[:, None] & mask_n,
            )
    if COMPUTE_A:
        at = (tl.program_id(1).to(tl.int64) * N + offs_n)[:, None] * width + offs_r[None, :]
        tl.store(partial + at, _total(sums_A, PRECISION), mask=(offs_n < N)[:, None] & (offs_r < width)[None, :])


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
    """The gradients of h = (mask x) A' (in parts [splits, M, padded R]), x, lora_A and lora_B.

    `wanted` says which of the last three are wanted; an unwanted one is empty. `wants_h`: the gradient of h is wanted
    even if no other gradient needs it. Those of lora_A and lora_B need x.
    Dropout's scale is in the gradient of h, which is the smallest.
    """
    (wants_x, wants_A, wants_B), like = wanted, grad if x is None else x
    grad_h, grad_B = empty(grad, 0), empty(lora_B, 0)
    h = _h(x, lora_A, drop) if x is not None and wants_B else None
    if wants_h or wants_x or wants_A:
        narrow = _input_product(like, lora_A, drop)[1].narrow
        grad_h, grad_B = _at_the_output(grad, lora_B, scaling, drop.scale, h, narrow)
    elif h is not None:
        grad_B = _summed_over_rows(grad, h, lora_B, scaling)
    del h
    if not (wants_x or wants_A):
        return grad_h, empty(like, 0), empty(lora_A, 0), grad_B
    return grad_h, *at_the_input(grad, x, lora_A, grad_h, drop, wants_x, wants_A), grad_B


def _h(x: Tensor, lora_A: Tensor, drop: Dropout) -> Tensor:
    return sweep(flat(x), lora_A, drop, drop.scale)[0]


def _at_the_output(
    grad: Tensor, lora_B: Tensor, scaling: float, drop_scale: float, h: Tensor | None, narrow: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of h before dropout's scale, in any number of parts, and of lora_B where h is given.

    One launch adds the parts of both, or of h and its gradient. `narrow` is the dtype of the sum of those of h.
    """
    rank = lora_B.shape[1]
    together = h is not None and in_one_sweep(grad.dtype, lora_B.dtype, rank)
    other, scale = h if together else None, scaling * drop_scale
    grad_h, parts = sweep(flat(grad), lora_B.t(), NOTHING_DROPPED, scale, other)
    if h is None:
        return grad_h, empty(lora_B, 0)
    if together:
        own = Sum(parts, rank, scaling, lora_B.dtype)
        if grad_h.shape[0] == 1:
            return grad_h, reduce(own)[0]
        grad_B, total = reduce(own, joining(grad_h, narrow))
        return total[None], grad_B
    if h.shape[0] > 1 and grad_h.shape[0] > 1:
        factor = adapter_product("lora_input", grad.dtype, lora_B.dtype, rank).narrow
        h, grad_h = (total[None] for total in reduce(joining(h, factor), joining(grad_h, narrow)))
    return grad_h, _summed_over_rows(grad, h, lora_B, scaling)


def in_one_sweep(matrix: torch.dtype, narrow: torch.dtype, rank: int) -> bool:
    """Whether one pass over grad makes both grad_h and grad_B.

    grad_h is a sum over columns and grad_B a sum over rows. A pass that makes both must write partial sums of one of
    them (4 r / rows bytes per element) and read them again; the registers for grad_h limit the rows of a tile. This
    takes less time and memory than reading grad twice only if the rank is low.
    """
    return rank <= 16 and adapter_product("lora_sweep_both", matrix, narrow, rank).operand.itemsize == 2


def _summed_over_rows(grad: Tensor, h: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``scaling * grad' h``: the kernel for lora_A's gradient, with grad in place of x."""
    N, R = lora_B.shape
    arithmetic = adapter_product("lora_input", grad.dtype, lora_B.dtype, R)
    h, drop = joined(h, arithmetic.narrow), NOTHING_DROPPED
    run = partial(_input_gradients, grad, grad, lora_B.t(), h, drop, False, True, arithmetic)
    _, parts = tuned("lora_input", run, (h.shape[0], N, R), arithmetic, grad, "A")
    return reduce(Sum(parts, R, scaling, lora_B.dtype))[0]


def at_the_input(
    grad: Tensor, x: Tensor | None, lora_A: Tensor, grad_h: Tensor, drop: Dropout, wants_x: bool, wants_A: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and lora_A from grad_h [parts, M, padded R], that of (mask x) A'. An unwanted one is empty."""
    (R, N), like = lora_A.shape, grad if x is None else x
    name, arithmetic = _input_product(like, lora_A, drop)
    grad_h = joined(grad_h, arithmetic.narrow)
    run = partial(_input_gradients, grad, x, lora_A, grad_h, drop, wants_x, wants_A, arithmetic)
    flags = (wants_x and "x", wants_A and "A")
    grad_x, parts = tuned(name, run, (grad_h.shape[0], N, R), arithmetic, like, *flags)
    return grad_x, reduce(Sum(parts, R, 1.0, lora_A.dtype, transpose=True))[0] if wants_A else empty(lora_A, 0)


def _input_product(like: Tensor, lora_A: Tensor, drop: Dropout) -> tuple[str, Product]:
    """The kernel's name and arithmetic. With dropout a thread has more to compute, so there is a table for it."""
    name = "lora_input" if drop.rng_state is None else "lora_input_dropped"
    return name, adapter_product(name, like.dtype, lora_A.dtype, lora_A.shape[0])


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
    """grad_x, and the parts [groups, d_in, padded R] of grad_A. An unwanted one is empty."""
    (R, N), (M, width), like = lora_A.shape, grad_h.shape, grad if x is None else x
    block_r, tiles = rank_tile(R, arithmetic.narrow, True), triton.cdiv(N, chosen.block_n)
    # Each group writes a sum. All take at most an eighth of a half-precision x, or 4 MiB, which stay in the cache.
    most = max(1, M // max(16, 16 * width), SMALL // max(1, N * width)) if wants_A else PARTS[-1]
    groups, group_m = splits(tiles, M, chosen.block_m, chosen.slots, most)
    grad_x = empty(like, (*grad.shape[:-1], N) if wants_x else 0)
    partial = empty(grad_h, (groups, N, width) if wants_A else 0, dtype=torch.float32)
    x_rows = flat(x) if x is not None and wants_A else lora_A
    launch(
        _lora_input_kernel,
        (tiles, groups, max(1, triton.cdiv(R, block_r)) if wants_A else 1),
        x_rows,
        lora_A,
        grad_h,
        drop.rng_state,
        grad_x,
        partial,
        M,
        N,
        R,
        width,
        *x_rows.stride(),
        *lora_A.stride(),
        group_m,
        drop.threshold,
        BLOCK_R=block_r,
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_DROPOUT=drop.rng_state is not None,
        COMPUTE_X=wants_x,
        COMPUTE_A=wants_A,
        ONE_TILE=block_r >= R,
        **chosen.constants,
    )
    return grad_x, partial
