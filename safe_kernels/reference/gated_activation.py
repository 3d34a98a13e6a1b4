"""The gated linear unit of transformers' MLPs (Shazeer 2020, arXiv 2002.05202): SwiGLU, GeGLU, ReGLU, with dropout."""

from __future__ import annotations

from torch import Tensor

from safe_kernels.reference.activation import check_kind, pull_back, value
from safe_kernels.reference.common import compute_dtype, dropout_of


def gated_activation(
    gate: Tensor, up: Tensor, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None
) -> Tensor:
    """Return ``dropout(act(gate) * up)`` of gate and up [..., d], contiguous; the rest is as in `activation`."""
    dtype = compute_dtype(gate, up)
    product = value(gate.to(dtype), kind) * up.to(dtype)
    return dropout_of(product, dropout_p, rng_state).to(gate.dtype).contiguous()


def gated_activation_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    kind: str,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gated_activation` for gate and up; one that `output_mask` excludes has shape [0].

    `up` is read only if grad_gate is requested.
    """
    check_kind(kind)
    want_gate, want_up = output_mask
    dtype = compute_dtype(gate, up)
    grad_product = dropout_of(grad.to(dtype), dropout_p, rng_state)
    grad_gate, grad_up = gate.new_empty(0), up.new_empty(0)
    if want_gate:
        grad_gate = pull_back(grad_product * up.to(dtype), gate.to(dtype), kind).to(gate.dtype).contiguous()
    if want_up:
        grad_up = (grad_product * value(gate.to(dtype), kind)).to(up.dtype).contiguous()
    return grad_gate, grad_up
