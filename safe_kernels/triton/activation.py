"""Activations with dropout on a GPU: each tensor is read once and the result is written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.elementwise import _dropped, _pull_back, _read, _tile, _value, _write
from safe_kernels.triton.runtime import host
from safe_kernels.triton.runtime.launch_replay import empty


@triton.jit
def _activation_kernel(
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
    KIND: tl.constexpr,
):
    offs_m, start_n, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    values = _value(_read(x, offs_m, offs_n, stride_x_m, stride_x_n, mask), KIND)
    values = _dropped(values, rng, offs_m, start_n, threshold, dropout_scale, HAS_DROPOUT)
    _write(out, offs_m, offs_n, N, values, mask)


@triton.jit
def _activation_backward_kernel(
    grad,
    x,
    grad_x,
    rng,
    M,
    N,
    stride_grad_m,
    stride_grad_n,
    stride_x_m,
    stride_x_n,
    dropout_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KIND: tl.constexpr,
):
    offs_m, start_n, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    values = _read(grad, offs_m, offs_n, stride_grad_m, stride_grad_n, mask)
    values = _dropped(values, rng, offs_m, start_n, threshold, dropout_scale, HAS_DROPOUT)
    values = _pull_back(values, _read(x, offs_m, offs_n, stride_x_m, stride_x_n, mask), KIND)
    _write(grad_x, offs_m, offs_n, N, values, mask)


@host.served_by(reference.activation)
def activation(x: Tensor, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None) -> Tensor:
    """See `safe_kernels.reference.activation`."""
    out = empty(x, x.shape)
    host.elementwise(_activation_kernel, [x], [out], host.dropout(dropout_p, rng_state), KIND=kind)
    return out


@host.served_by(reference.activation_backward)
def activation_backward(grad: Tensor, x: Tensor, kind: str, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """See `safe_kernels.reference.activation_backward`."""
    grad_x = empty(x, x.shape)
    drop = host.dropout(dropout_p, rng_state)
    host.elementwise(_activation_backward_kernel, [grad, x], [grad_x], drop, KIND=kind)
    return grad_x
