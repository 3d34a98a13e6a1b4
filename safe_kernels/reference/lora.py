"""LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3, with the sums that score the adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, dropout_factor, dropped, rows_of
from safe_kernels.reference.importance import cka_sums


def lora(
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_starts: Tensor | None = None,
    block_rows: int = 0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``out = base + scaling * (dropout(x) A') B'`` and the sums that score the adapter (see `cka_sums`).

    x is [..., d_in], base and out [..., d_out], lora_A [r, d_in], lora_B [d_out, r], and `rng_state` int64 [2]. Each of
    the scored blocks begins at a flattened row in `block_starts`, int64 [n]; None scores nothing, and the sums have
    shape [0].
    """
    dtype = compute_dtype(x, base, lora_A, lora_B)
    rows = rows_of(x)
    h = dropped(rows, dropout_factor(rows, dropout_p, rng_state, dtype), dtype) @ lora_A.to(dtype).t()
    delta = scaling * (h @ lora_B.to(dtype).t())
    out = (base.to(dtype) + delta.reshape(base.shape)).to(base.dtype)
    if block_starts is None:
        return out.contiguous(), x.new_empty(0, dtype=torch.float64)
    base_rows = rows_of(base)
    return out.contiguous(), cka_sums(base_rows, delta, block_starts, block_rows, row_weight)


def lora_backward(
    grad: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `lora` for x, lora_A and lora_B; one that `output_mask` excludes has shape [0].

    The gradient for base is grad [..., d_out] itself. x may be None if only grad_x is requested, which does not depend
    on it. Dropout's mask is computed again from `rng_state`.
    """
    want_x, want_A, want_B = output_mask
    like_x = grad if x is None else x
    dtype = compute_dtype(grad, like_x, lora_A, lora_B)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    grad_rows = scaling * rows_of(grad).to(dtype)
    shape = (*grad.shape[:-1], lora_A.shape[1])
    factor = dropout_factor(rows_of(grad.new_empty(shape)), dropout_p, rng_state, dtype)
    grad_x, grad_A, grad_B = like_x.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    grad_h = grad_rows @ B if want_x or want_A else None
    if grad_h is not None and want_x:
        grad_x = dropped(grad_h @ A, factor, dtype).to(like_x.dtype).reshape(shape)
    if x is not None and (want_A or want_B):
        x_dropped = dropped(rows_of(x), factor, dtype)
        if grad_h is not None and want_A:
            grad_A = (grad_h.t() @ x_dropped).to(lora_A.dtype)
        if want_B:
            grad_B = (grad_rows.t() @ (x_dropped @ A.t())).to(lora_B.dtype)
    return grad_x, grad_A, grad_B
