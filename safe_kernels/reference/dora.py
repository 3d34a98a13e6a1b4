"""DoRA, Liu et al. 2024 (arXiv 2402.09353), eq. 5, with the norm as a constant (section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, dropout_of, rows_of
from safe_kernels.reference.lora import lora, lora_backward


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
    """Return ``x W' + bias + (scale - 1) y W' + scale * scaling * (y A') B'``, with y = dropout(x).

    ``scale = magnitude / norm``, one number per row of weight. Without dropout this is
    ``scale * x (W + scaling * B A)' + bias``. As in PEFT, dropout acts on a second product with the weight.

    Args:
        x: [..., d_in], the layer's input.
        weight: [d_out, d_in], any dtype; the products are computed in the dtype of x.
        bias: [d_out], or None.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        magnitude: [d_out].
        scaling: as in `lora`.
        dropout_p: as in `lora`.
        rng_state: as in `lora`.

    Returns:
        out [..., d_out], contiguous and typed like x, and norm [d_out], the norm of each row of W + scaling * B A, in
        the dtype of lora_A.
    """
    dtype = compute_dtype(x, weight, lora_A, lora_B, magnitude)
    W, A, B, wide = weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype), x.to(dtype)
    norm = torch.linalg.vector_norm(W + scaling * (B @ A), dim=1).to(lora_A.dtype)
    scale = magnitude.to(dtype) / norm.to(dtype)
    base = wide @ W.t() + (scale - 1) * (dropout_of(wide, dropout_p, rng_state) @ W.t())
    if bias is not None:
        base = base + bias.to(dtype)
    out, _ = lora(wide, base, A, scale[:, None] * B, scaling, dropout_p, rng_state)
    return out.to(x.dtype), norm


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
    """Return the gradients of `dora`.

    Args:
        grad: [..., d_out], of the dtype of x.
        x: [..., d_in], the layer's input; None if only grad_x is requested.
        weight: [d_out, d_in].
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        magnitude: [d_out].
        norm: [d_out], from `dora`.
        scaling: as in `lora`.
        dropout_p: as in `lora`.
        rng_state: as in `lora`; the mask is computed again from it.
        output_mask: which of (grad_x, grad_A, grad_B, grad_magnitude) are requested.

    Returns:
        grad_x [..., d_in], typed like x, grad_A [r, d_in], grad_B [d_out, r], grad_magnitude [d_out]; a gradient
        that is not requested has shape [0].
    """
    want_x, want_A, want_B, want_magnitude = output_mask
    like_x = grad if x is None else x
    dtype = compute_dtype(grad, weight, lora_A, lora_B, magnitude)
    W, A, B, wide = weight.to(dtype), lora_A.to(dtype), lora_B.to(dtype), grad.to(dtype)
    scale = (magnitude.to(dtype) / norm.to(dtype))[:, None]
    inputs = None if x is None else x.to(dtype)
    wanted = [want_x, want_A, want_B or want_magnitude]
    grad_x, grad_A, grad_scaled = lora_backward(wide, inputs, A, scale * B, scaling, dropout_p, rng_state, wanted)
    grad_magnitude = magnitude.new_empty(0)
    if inputs is not None and want_magnitude:
        product = rows_of(dropout_of(inputs, dropout_p, rng_state) @ W.t())
        summed = (rows_of(wide) * product).sum(0) + (grad_scaled * B).sum(1)
        grad_magnitude = (summed / norm.to(dtype)).to(magnitude.dtype)
    if want_x:
        part = (wide * (scale[:, 0] - 1)) @ W
        grad_x = (grad_x + wide @ W + dropout_of(part, dropout_p, rng_state)).to(like_x.dtype).contiguous()
    else:
        grad_x = like_x.new_empty(0)
    grad_B = (grad_scaled * scale).to(lora_B.dtype).contiguous() if want_B else lora_B.new_empty(0)
    return grad_x, grad_A.to(lora_A.dtype), grad_B, grad_magnitude
