"""The kernels of `rms_norm` and `layer_norm`, which differ only in the mean and the bias.

A program holds whole rows in registers, so that each tensor is read once and written once. Longer rows use the
reference. Backward recomputes the normalised row from the retained tensor: the input or the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from safe_kernels.triton.runtime.configs import row_config
from safe_kernels.triton.runtime.host import flat, require_shape
from safe_kernels.triton.runtime.launch_replay import empty, launch

LONGEST = 8192
"""The longest row, in elements, that fits in registers."""


@triton.jit
def _affine(weight, bias, offs_n, N, offset):
    """The scale and the shift of the normalised rows, in float32."""
    scale = tl.full(offs_n.shape, 1.0, tl.float32)
    shift = tl.zeros(offs_n.shape, tl.float32)
    if weight is not None:
        scale = tl.load(weight + offs_n, mask=offs_n < N, other=1.0).to(tl.float32) + offset
    if bias is not None:
        shift = tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _norm_forward_kernel(
    x,  # [M, N]
    weight,
    bias,
    out,  # [M, N], contiguous
    mean,  # [M]
    rstd,  # [M]
    M,
    N,
    stride_x_m,
    stride_x_n,
    eps,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CENTRED: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    scale, shift = _affine(weight, bias, offs_n, N, offset)
    offs_m64 = offs_m.to(tl.int64)[:, None]
    at = x + offs_m64 * stride_x_m + offs_n.to(tl.int64)[None, :] * stride_x_n
    values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        middle = tl.sum(values, axis=1) / N
        values = tl.where(mask, values - middle[:, None], 0.0)
        tl.store(mean + offs_m, middle, mask=offs_m < M)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / N + eps)
    tl.store(rstd + offs_m, inverse, mask=offs_m < M)
    result = values * inverse[:, None] * scale[None, :] + shift[None, :]
    tl.store(out + offs_m64 * N + offs_n[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward_kernel(
    grad,  # [M, N]
    retained,  # [M, N]
    weight,
    bias,
    mean,  # [M]
    rstd,  # [M]
    grad_x,  # [M, N], contiguous
    partial,  # [2, programs, N]: partial gradients of weight and bias
    M,
    N,
    stride_grad_m,
    stride_grad_n,
    stride_retained_m,
    stride_retained_n,
    rows_per_program,
    offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CENTRED: tl.constexpr,
    FROM_OUTPUT: tl.constexpr,
    COMPUTE_X: tl.constexpr,
    COMPUTE_WEIGHT: tl.constexpr,
    COMPUTE_BIAS: tl.constexpr,
):
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_n64 = offs_n.to(tl.int64)[None, :]
    scale, shift = _affine(weight, bias, offs_n, N, offset)
    weights = tl.zeros([BLOCK_N], tl.float32)
    biases = tl.zeros([BLOCK_N], tl.float32)
    for start_m in range(begin, end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask = (offs_m < end)[:, None] & (offs_n < N)[None, :]
        offs_m64 = offs_m.to(tl.int64)[:, None]
        g = tl.load(grad + offs_m64 * stride_grad_m + offs_n64 * stride_grad_n, mask=mask, other=0.0).to(tl.float32)
        normal = tl.load(retained + offs_m64 * stride_retained_m + offs_n64 * stride_retained_n, mask=mask, other=0.0)
        normal = normal.to(tl.float32)
        inverse = tl.load(rstd + offs_m, mask=offs_m < end, other=0.0).to(tl.float32)[:, None]
        if FROM_OUTPUT:
            normal = (normal - shift[None, :]) / scale[None, :]
        else:
            if CENTRED:
                normal -= tl.load(mean + offs_m, mask=offs_m < end, other=0.0).to(tl.float32)[:, None]
            normal *= inverse
        normal = tl.where(mask, normal, 0.0)
        if COMPUTE_WEIGHT:
            weights += tl.sum(g * normal, axis=0)
        if COMPUTE_BIAS:
            biases += tl.sum(g, axis=0)
        if COMPUTE_X:
            g *= scale[None, :]
            rest = normal * (tl.sum(g * normal, axis=1) / N)[:, None]
            if CENTRED:
                rest += (tl.sum(g, axis=1) / N)[:, None]
            result = inverse * (g - rest)
            tl.store(grad_x + offs_m64 * N + offs_n64, result.to(grad_x.dtype.element_ty), mask=mask)
    to = partial + tl.cast(tl.program_id(0), tl.int64) * N + offs_n
    if COMPUTE_WEIGHT:
        tl.store(to, weights, mask=offs_n < N)
    if COMPUTE_BIAS:
        tl.store(to + tl.cast(tl.num_programs(0), tl.int64) * N, biases, mask=offs_n < N)


class Affine(NamedTuple):
    """The parameters that are applied after the normalisation."""

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
    """Normalises the rows of x: out, mean (empty unless `centred`) and rstd. Rows have at most `LONGEST` elements."""
    _check(x, affine)
    rows = flat(x)
    out = empty(x, x.shape)
    mean, rstd = (empty(x, x.shape[:-1] if wanted else 0, dtype=torch.float32) for wanted in (centred, True))
    chosen = row_config(rows.shape[1])
    launch(
        _norm_forward_kernel,
        (triton.cdiv(rows.shape[0], chosen.block_m),),
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
        CENTRED=centred,
        **chosen.constants,
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
    """The gradients of `norm_forward`: of x (empty if not wanted), weight and bias (float32 [d], or None).

    `retained` is the output if `from_output`, otherwise x; then the mean in `statistics` is read, too.
    """
    _check(retained, affine)
    require_shape("grad", grad, tuple(retained.shape))
    rows, grads = flat(retained), flat(grad)
    (M, N), chosen = rows.shape, row_config(rows.shape[1])
    wants_x, wants_weight, wants_bias = wanted
    sums = wants_weight or wants_bias
    # Every program writes partial sums over rows, so few programs are best; without sums, one per tile is simplest.
    tiles = max(1, triton.cdiv(triton.cdiv(M, 512), chosen.block_m)) if sums else 1
    rows_per_program = tiles * chosen.block_m
    programs = triton.cdiv(M, rows_per_program)
    grad_x = empty(retained, retained.shape if wants_x else 0)
    partial = empty(retained, (2, programs, N) if sums else 0, dtype=torch.float32)
    mean, rstd = statistics
    flags: dict[str, Any] = {"COMPUTE_X": wants_x, "COMPUTE_WEIGHT": wants_weight, "COMPUTE_BIAS": wants_bias}
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
        M,
        N,
        *grads.stride(),
        *rows.stride(),
        rows_per_program,
        affine.offset,
        CENTRED=centred,
        FROM_OUTPUT=from_output,
        **flags,
        **chosen.constants,
    )
    return grad_x, partial[0].sum(0) if wants_weight else None, partial[1].sum(0) if wants_bias else None
