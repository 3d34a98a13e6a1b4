"""Gated activations with dropout on a GPU: one read of each tensor, one write of each result."""

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
    up,
    out,
    rng,
    rows,
    columns,
    gate_row,
    gate_column,
    up_row,
    up_column,
    dropout_scale,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KIND: tl.constexpr,
):
    row, first, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    values = _value(_read(gate, row, column, gate_row, gate_column, inside), KIND)
    values *= _read(up, row, column, up_row, up_column, inside)
    values = _dropped(values, rng, row, first, threshold, dropout_scale, HAS_DROPOUT)
    _write(out, row, column, columns, values, inside)


@triton.jit
def _gated_activation_backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    rng,
    rows,
    columns,
    grad_row,
    grad_column,
    gate_row,
    gate_column,
    up_row,
    up_column,
    dropout_scale,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE_GATE: tl.constexpr,
    COMPUTE_UP: tl.constexpr,
):
    row, first, column, inside = _tile(rows, columns, ROWS, COLUMNS)
    values = _read(grad, row, column, grad_row, grad_column, inside)
    values = _dropped(values, rng, row, first, threshold, dropout_scale, HAS_DROPOUT)
    x = _read(gate, row, column, gate_row, gate_column, inside)
    if COMPUTE_GATE:
        before = values * _read(up, row, column, up_row, up_column, inside)
        _write(grad_gate, row, column, columns, _pull_back(before, x, KIND), inside)
    if COMPUTE_UP:
        _write(grad_up, row, column, columns, values * _value(x, KIND), inside)


@host.served_by(reference.gated_activation)
def gated_activation(
    gate: Tensor, up: Tensor, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None
) -> Tensor:
    """See `safe_kernels.reference.gated_activation`."""
    out = empty(gate, gate.shape)
    drop = host.dropout(dropout_p, rng_state)
    host.elementwise(_gated_activation_kernel, [gate, up], [out], drop, KIND=kind)
    return out


@host.served_by(reference.gated_activation_backward)
def gated_activation_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    kind: str,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """See `safe_kernels.reference.gated_activation_backward`."""
    wants_gate, wants_up = output_mask
    grad_gate, grad_up = empty(gate, gate.shape if wants_gate else 0), empty(up, up.shape if wants_up else 0)
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
