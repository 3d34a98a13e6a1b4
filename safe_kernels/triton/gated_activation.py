"""Activations with dropout on a GPU, gated and plain: each tensor is read once and each result is written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.lib.elementwise import _dropped, _pull_back, _read, _tile, _value, _write
from safe_kernels.triton.runtime import host
from safe_kernels.triton.runtime.launch_replay import empty


@triton.jit
def _gated_activation_kernel(
    gate,
    up,  # None: a plain activation
    out,
    rng,
    M,
    N,
    stride_gate_m,
    stride_gate_n,
    stride_up_m,
    stride_up_n,
    dropout_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KIND: tl.constexpr,
):
    offs_m, start_n, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    values = _value(_read(gate, offs_m, offs_n, stride_gate_m, stride_gate_n, mask), KIND)
    if up is not None:
        values *= _read(up, offs_m, offs_n, stride_up_m, stride_up_n, mask)
    values = _dropped(values, rng, offs_m, start_n, threshold, dropout_scale, HAS_DROPOUT)
    _write(out, offs_m, offs_n, N, values, mask)


@triton.jit
def _gated_activation_backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    rng,
    M,
    N,
    stride_grad_m,
    stride_grad_n,
    stride_gate_m,
    stride_gate_n,
    stride_up_m,
    stride_up_n,
    dropout_scale,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE_GATE: tl.constexpr,
    COMPUTE_UP: tl.constexpr,
):
    offs_m, start_n, offs_n, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    values = _read(grad, offs_m, offs_n, stride_grad_m, stride_grad_n, mask)
    values = _dropped(values, rng, offs_m, start_n, threshold, dropout_scale, HAS_DROPOUT)
    x = _read(gate, offs_m, offs_n, stride_gate_m, stride_gate_n, mask)
    if COMPUTE_GATE:
        before = values
        if up is not None:
            before *= _read(up, offs_m, offs_n, stride_up_m, stride_up_n, mask)
        _write(grad_gate, offs_m, offs_n, N, _pull_back(before, x, KIND), mask)
    if COMPUTE_UP:
        _write(grad_up, offs_m, offs_n, N, values * _value(x, KIND), mask)


@host.served_by(reference.gated_activation)
def gated_activation(
    gate: Tensor, up: Tensor | None, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None
) -> Tensor:
    """See `safe_kernels.reference.gated_activation`; without `up` it is `safe_kernels.reference.activation`."""
    out = empty(gate, gate.shape)
    drop = host.dropout(dropout_p, rng_state)
    host.elementwise(_gated_activation_kernel, [gate, up], [out], drop, KIND=kind)
    return out


@host.served_by(reference.gated_activation_backward)
def gated_activation_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    kind: str,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor | None]:
    wants_gate, wants_up = output_mask
    grad_gate = empty(gate, gate.shape if wants_gate else 0)
    grad_up = None if up is None else empty(up, up.shape if wants_up else 0)
    if wants_gate or wants_up:
        host.elementwise(
            _gated_activation_backward_kernel,
            [grad, gate, up],
            [grad_gate, grad_up],
            host.dropout(dropout_p, rng_state),
            KIND=kind,
            COMPUTE_GATE=wants_gate,
            COMPUTE_UP=wants_up,
        )
    return grad_gate, grad_up
