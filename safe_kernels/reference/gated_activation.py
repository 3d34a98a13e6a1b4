"""The gated linear unit of transformers' MLPs (Shazeer 2020, arXiv 2002.05202): SwiGLU, GeGLU, ReGLU, with dropout."""

from __future__ import annotations

from torch import Tensor

from safe_kernels.reference.activation import check_kind, pull_back, value
from safe_kernels.reference.common import compute_dtype, dropout_of


def gated_activation(
    gate: Tensor, up: Tensor, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None
) -> Tensor:
    """Return ``dropout(act(gate) * up)``.

    Args:
        gate: [..., d], the pre-activation.
        up: [..., d], the factor of the activation.
        kind: one of `safe_kernels.reference.activation.KINDS`.
        dropout_p: probability that an element is dropped.
        rng_state: int64 [2] = (seed, offset); needed when ``dropout_p > 0``.

    Returns:
        A contiguous tensor shaped and typed like gate.
    """
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
    """Return the gradients of `gated_activation` for gate and up.

    Args:
        grad: [..., d], gradient of the output.
        gate: [..., d], as in `gated_activation`.
        up: [..., d], as in `gated_activation`; read only if grad_gate is requested.
        kind: as in `gated_activation`.
        dropout_p: as in `gated_activation`.
        rng_state: as in `gated_activation`; the mask is computed again from it.
        output_mask: which of (grad_gate, grad_up) are requested.

    Returns:
        grad_gate, grad_up, contiguous and typed like gate and up; a gradient that is not requested has shape [0].
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
