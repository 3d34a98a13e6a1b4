"""Activations and their derivatives inside a kernel, and the tiles of element-wise kernels.

The formulas are in safe_kernels/reference/activation.py. Here gelu uses the GPU's erf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from safe_kernels.triton.lib.philox import _keep, _rng_words


@triton.jit
def _value(x, KIND: tl.constexpr):
    """The activation of x, in float32."""
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))
    elif KIND == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _pull_back(grad, x, KIND: tl.constexpr):
    """The gradient of x: grad times the activation's derivative at x; relu stops even an infinite gradient."""
    if KIND == "silu":
        s = tl.sigmoid(x)
        return grad * (s * (1.0 + x * (1.0 - s)))
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return grad * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    elif KIND == "gelu_tanh":
        x = tl.where(x < -10.0, -10.0, tl.where(x > 10.0, 10.0, x))  # NaN stays NaN
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = tl.sigmoid(u)
        return grad * (s + x * s * tl.sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        return tl.where(x <= 0.0, 0.0, grad)


@triton.jit
def _dropped(values, rng, offs_m, start_n, threshold, dropout_scale, HAS_DROPOUT: tl.constexpr):
    """A tile of float32 values after dropout."""
    if HAS_DROPOUT:
        keep = _keep(_rng_words(rng), offs_m, start_n, threshold, values.shape[1])
        values = values * (keep.to(tl.float32) * dropout_scale)
    return values


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's rows, its first column, its columns, and the mask of existing elements."""
    across = tl.cdiv(N, BLOCK_N)
    offs_m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(0) % across * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    return offs_m, start_n, offs_n, (offs_m < M)[:, None] & (offs_n < N)[None, :]


@triton.jit
def _read(tensor, offs_m, offs_n, stride_m, stride_n, mask):
    """A tile in float32."""
    at = tensor + offs_m.to(tl.int64)[:, None] * stride_m + offs_n.to(tl.int64)[None, :] * stride_n
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(tensor, offs_m, offs_n, N, values, mask):
    """A tile of a contiguous result, rounded once."""
    at = tensor + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(at, values.to(tensor.dtype.element_ty), mask=mask)
