"""A linear layer fused with its LoRA adapter on a GPU: the layer's output without the adapter is never stored.

The result begins as the rank-r product; in backward dropout's mask multiplies it. Then the large product is added::

    forward     out    = (h) B' + bias + x W'                      h = scaling * dropout(x) A'
    backward    grad_x = mask * (grad_h) A + grad W                grad_h = scaling / (1 - p) * grad B

There are two forms. In the first, the adapter's kernels write the small product, and the vendor's library adds the
large one to it. Compared with `lora` over a layer, this saves one read of the output, a second output, and autograd's
addition of two gradients. In the second, one kernel makes a tile of both, and nothing is written twice. Its matrix
product is slower than the library's (1.5x the time on an H200 at d 8192), so it is used only if tuning finds it faster.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.cka import block_sums
from safe_kernels.triton.lib.lora_gradients import NOTHING_DROPPED, adapter_gradients, at_the_input
from safe_kernels.triton.lib.philox import _keep, _rng_words
from safe_kernels.triton.lib.skinny_matmul import _load_narrow, _load_parts, padded, sweep
from safe_kernels.triton.lora import apply
from safe_kernels.triton.runtime.configs import NO_TILES, Config, rank_tile
from safe_kernels.triton.runtime.host import (
    TYPES,
    Dropout,
    choose,
    dropout,
    flat,
    product,
    require_shape,
    served_by,
    tuned,
)
from safe_kernels.triton.runtime.launch_replay import empty, launch, multiply_add


@triton.jit
def _lora_linear_kernel(
    left,  # [M, K]
    right,  # [K, N]
    bias,  # [N]
    narrow_left,  # [SPLITS, M, width]
    narrow_right,  # [R, N]
    rng,
    out,  # [M, N], contiguous
    M,
    N,
    K,
    R,
    width,
    stride_left_m,
    stride_left_k,
    stride_right_k,
    stride_right_n,
    stride_narrow_r,
    stride_narrow_n,
    scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_TILE: tl.constexpr,  # one tile holds the rank: no loop, because wgmma would wait around it
    GROUP_M: tl.constexpr,
    SPLITS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # Programs that run at the same time share rows and columns: GROUP_M tiles of rows times all columns.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    offs_m = (group * GROUP_M + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = within // height * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    offs_m64, offs_n64 = offs_m.to(tl.int64)[:, None], offs_n.to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_r = tl.arange(0, BLOCK_R)
    if ONE_TILE:
        thin = (_load_parts(narrow_left, offs_m, offs_r, M, width, SPLITS) * scale).to(OPERAND)
        short = _load_narrow(narrow_right, offs_r, offs_n64, R, stride_narrow_r, stride_narrow_n, mask_n).to(OPERAND)
        acc = tl.dot(thin, short, acc, input_precision=PRECISION)
    else:
        for start_r in range(0, R, BLOCK_R):
            thin = (_load_parts(narrow_left, offs_m, start_r + offs_r, M, width, SPLITS) * scale).to(OPERAND)
            short = _load_narrow(narrow_right, start_r + offs_r, offs_n64, R, stride_narrow_r, stride_narrow_n, mask_n)
            acc = tl.dot(thin, short.to(OPERAND), acc, input_precision=PRECISION)
    if HAS_DROPOUT:
        acc *= _keep(_rng_words(rng), offs_m, start_n, threshold, BLOCK_N).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    left_at = left + offs_m64 * stride_left_m + offs_k.to(tl.int64)[None, :] * stride_left_k
    right_at = right + offs_k.to(tl.int64)[:, None] * stride_right_k + offs_n64 * stride_right_n
    for start_k in range(0, K, BLOCK_K):
        mask_k = start_k + offs_k < K
        a = tl.load(left_at, mask=mask_m & mask_k[None, :], other=0.0).to(OPERAND)
        b = tl.load(right_at, mask=mask_k[:, None] & mask_n, other=0.0).to(OPERAND)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        left_at += BLOCK_K * stride_left_k
        right_at += BLOCK_K * stride_right_k
    tl.store(out + offs_m64 * N + offs_n64, acc.to(out.dtype.element_ty), mask=mask_m & mask_n)


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
    drop, rows = dropout(dropout_p, rng_state), flat(x)
    require_shape("lora_A", lora_A, (lora_B.shape[1], rows.shape[1]))
    require_shape("weight", weight, (lora_B.shape[0], rows.shape[1]))
    if bias is not None:
        require_shape("bias", bias, lora_B.shape[:1])
    h, _ = sweep(rows, lora_A, drop, scale=drop.scale)
    out = _forward(x, weight, bias, lora_B, h, scaling)
    if block_starts is None:
        return out, empty(x, 0, dtype=torch.float64)
    # The features without the adapter do not exist: the output is scored, with the roles swapped.
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
    wants_x, wants_weight, wants_bias, wants_A, wants_B = output_mask
    grad = grad.to(weight.dtype)
    drop, rows = dropout(dropout_p, rng_state), flat(grad)
    require_shape("grad", rows, (rows.shape[0], lora_B.shape[0]))
    require_shape("weight", weight, (lora_B.shape[0], lora_A.shape[1]))
    grad_x, grad_weight, grad_bias = empty(weight, 0), empty(weight, 0), empty(weight, 0)
    form = _backward_form(grad, weight, lora_A, drop) if wants_x else NO_TILES
    wanted = (wants_x and form == NO_TILES, wants_A, wants_B)
    grad_h, part, grad_A, grad_B = adapter_gradients(grad, x, lora_A, lora_B, scaling, drop, wanted, wants_x)
    if wants_x and form == NO_TILES:
        grad_x = part
        multiply_add(flat(grad_x), rows, weight)
    elif wants_x:
        grad_x = _multiply(grad, weight, None, grad_h, lora_A, drop, 1.0, form)
    if wants_weight and x is not None:
        grad_weight = rows.t().to(weight.dtype) @ flat(x)
    if wants_bias:
        grad_bias = rows.sum(0, dtype=torch.float32).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_A, grad_B


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor, h: Tensor, scaling: float) -> Tensor:
    def run(form: Config) -> Tensor:
        if form == NO_TILES:
            out = apply(None, bias, x, lora_B, h, scaling, x.dtype)
            multiply_add(flat(out), flat(x), weight.t())
            return out
        return _multiply(x, weight.t(), bias, h, lora_B.t(), NOTHING_DROPPED, scaling, form)

    flags = (bias is not None and "bias", weight.stride(1) == 1 and "column")
    return tuned("lora_linear", run, _size(x, weight.t(), lora_B.shape[1]), product(x.dtype, weight.dtype), x, *flags)


def _backward_form(grad: Tensor, weight: Tensor, lora_A: Tensor, drop: Dropout) -> Config:
    """Tiles for grad_x, or `NO_TILES`. grad_h does not exist yet, so zeros of its shape are timed."""

    def run(form: Config) -> None:
        grad_h = grad.new_zeros((1, grad.numel() // grad.shape[-1], padded(lora_A.shape[0])), dtype=torch.float32)
        if form == NO_TILES:
            grad_x, _ = at_the_input(grad, None, lora_A, grad_h, drop, True, False)
            multiply_add(flat(grad_x), flat(grad), weight)
        else:
            _multiply(grad, weight, None, grad_h, lora_A, drop, 1.0, form)

    flags = (drop.rng_state is not None and "dropout", weight.stride(0) == 1 and "column", "backward")
    size, arithmetic = _size(grad, weight, lora_A.shape[0]), product(grad.dtype, weight.dtype)
    return choose("lora_linear", run, size, arithmetic, grad, *flags)


def _size(left: Tensor, right: Tensor, rank: int) -> tuple[int, int, int, int]:
    K, N = right.shape
    return math.prod(left.shape[:-1]), N, K, rank


def _multiply(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    narrow_left: Tensor,
    narrow_right: Tensor,
    drop: Dropout,
    scale: float,
    tiles: Config,
) -> Tensor:
    """``left right + bias + mask * scale * narrow_left narrow_right``; left [..., K], right [K, N]."""
    # A float32 adapter over a half-precision layer is rounded here: the result has half precision anyway.
    arithmetic = product(left.dtype, right.dtype)
    out, matrix = empty(right, (*left.shape[:-1], right.shape[1])), flat(left)
    (M, K), N, R = matrix.shape, right.shape[1], narrow_right.shape[0]
    block_r = rank_tile(R, arithmetic.operand)
    launch(
        _lora_linear_kernel,
        (triton.cdiv(M, tiles.block_m) * triton.cdiv(N, tiles.block_n),),
        matrix,
        right,
        None if bias is None else bias.contiguous(),
        narrow_left,
        narrow_right,
        drop.rng_state,
        out,
        M,
        N,
        K,
        R,
        narrow_left.shape[2],
        *matrix.stride(),
        *right.stride(),
        *narrow_right.stride(),
        scale,
        drop.threshold,
        BLOCK_R=block_r,
        ONE_TILE=block_r >= R,
        GROUP_M=8,
        SPLITS=narrow_left.shape[0],
        OPERAND=TYPES[arithmetic.operand],
        PRECISION=arithmetic.precision,
        HAS_DROPOUT=drop.rng_state is not None,
        **tiles.constants,
    )
    return out
