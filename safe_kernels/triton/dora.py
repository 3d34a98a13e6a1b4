"""DoRA on a GPU: the vendor's library multiplies by the weight, and the ops `dropout` and `lora` do the rest.

The other ops are called through the dispatcher, which replays their launches. All products with the weight are
computed in the dtype of x. (Without autocast, PEFT computes those with dropout in the adapter's dtype.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.runtime.host import flat, require_shape, served_by

NORM_ELEMENTS = 4 * 2**20
"""Elements of weight whose norms are computed at a time."""


def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The norm of each row of ``weight + scaling * B A``, of which only a few rows exist at a time.

    Args:
        weight: [d_out, d_in].
        A: [r, d_in].
        B: [d_out, r], of the dtype of A.
        scaling: as in `dora`.

    Returns:
        [d_out], of the dtype of A.
    """
    norm, rows = A.new_empty(weight.shape[0]), max(1, NORM_ELEMENTS // max(1, weight.shape[1]))
    parts = zip(weight.split(rows), B.split(rows), norm.split(rows), strict=True)
    for part, b, result in parts:
        torch.linalg.vector_norm(torch.addmm(part.to(A.dtype), b, A, alpha=scaling), dim=1, out=result)
    return norm


@served_by(reference.dora)
def dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    require_shape("lora_A", lora_A, (lora_B.shape[1], x.shape[-1]))
    require_shape("weight", weight, (lora_B.shape[0], x.shape[-1]))
    require_shape("magnitude", magnitude, lora_B.shape[:1])
    ops, W, A, B = torch.ops.safe_kernels, weight.to(x.dtype), lora_A.float(), lora_B.float()
    with torch._C._DisableAutocast():
        norm = weight_norm(weight, A, B, scaling).to(lora_A.dtype)
        scale = magnitude.float() / norm.float()
        if dropout_p > 0.0:
            base = F.linear(x, W, None if bias is None else bias.to(x.dtype)).float()
            base.addcmul_(F.linear(ops.dropout(x, dropout_p, rng_state), W), scale - 1)
        else:
            base = F.linear(x, W).float().mul_(scale)
            base = base if bias is None else base.add_(bias)
        out, _ = ops.lora(x, base, A, B * scale[:, None], scaling, dropout_p, rng_state)
    return out.to(x.dtype), norm


@served_by(reference.dora_backward)
def dora_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants_x, wants_A, wants_B, wants_magnitude = output_mask
    ops, rows, W, A, B = torch.ops.safe_kernels, flat(grad), weight.to(grad.dtype), lora_A.float(), lora_B.float()
    scale = magnitude.float() / norm.float()
    wanted = [wants_x, wants_A, wants_B or wants_magnitude]
    grad_magnitude, grad_B = magnitude.new_empty(0), lora_B.new_empty(0)
    with torch._C._DisableAutocast():
        scaled = (A, B * scale[:, None], scaling, dropout_p, rng_state, wanted)
        grad_x, grad_A, grad_scaled = ops.lora_backward(grad, x, *scaled)
        if wants_magnitude and x is not None:
            dropped = ops.dropout(x, dropout_p, rng_state) if dropout_p > 0.0 else x
            product = F.linear(flat(dropped), W) * rows
            summed = product.sum(0, dtype=torch.float32) + (grad_scaled * B).sum(1)
            grad_magnitude = (summed / norm).to(magnitude.dtype)
        if wants_x:
            part = (rows * (scale - 1 if dropout_p > 0.0 else scale)).to(W.dtype) @ W
            if dropout_p > 0.0:
                part = ops.dropout(part, dropout_p, rng_state).addmm_(rows, W)
            grad_x = grad_x + part.view_as(grad_x).to(grad_x.dtype)
        if wants_B:
            grad_B = (grad_scaled * scale[:, None]).to(lora_B.dtype)
    return grad_x, grad_A.to(lora_A.dtype), grad_B, grad_magnitude
