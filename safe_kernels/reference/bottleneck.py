"""Bottleneck adapters, Houlsby et al. 2019 (arXiv 1902.00751), figure 2.

In parallel to a sublayer, and with dropout of the hidden units: He et al. 2022 (arXiv 2110.04366).
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.activation import pull_back, value
from safe_kernels.reference.common import compute_dtype, dropout_of, rows_of
from safe_kernels.reference.importance import cka_sums


def bottleneck(
    x: Tensor,
    residual: Tensor,
    W_down: Tensor,
    b_down: Tensor,
    W_up: Tensor,
    b_up: Tensor,
    activation: str,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_starts: Tensor | None = None,
    block_rows: int = 0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``out = residual + scaling * (h W_up' + b_up)``, where ``h = dropout(act(z))`` and z is below.

    ``z = x W_down' + b_down``. x is [..., d_in], residual and out [..., d_out], W_down [r, d_in], b_down [r], W_up
    [d_out, r], b_up [d_out], and `activation` one of `activation.KINDS`. The second result is z [..., r], the third the
    sums that score the adapter (see `cka_sums`), as in `lora`; the features without the adapter are `residual`.
    """
    dtype = compute_dtype(x, residual, W_down, b_down, W_up, b_up)
    z = rows_of(x).to(dtype) @ W_down.to(dtype).t() + b_down.to(dtype)
    h = dropout_of(value(z, activation), dropout_p, rng_state)
    delta = scaling * (h @ W_up.to(dtype).t())
    shift = scaling * b_up.to(dtype)
    out = (residual.to(dtype) + (delta + shift).reshape(residual.shape)).to(residual.dtype).contiguous()
    kept = z.to(torch.promote_types(x.dtype, W_down.dtype)).reshape(*x.shape[:-1], W_down.shape[0]).contiguous()
    if block_starts is None:
        return out, kept, x.new_empty(0, dtype=torch.float64)
    # b_up shifts all rows by the same vector, and centring removes it.
    return out, kept, cka_sums(rows_of(residual), delta, block_starts, block_rows, row_weight)


def bottleneck_backward(
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    W_down: Tensor,
    b_down: Tensor,
    W_up: Tensor,
    activation: str,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `bottleneck` for x, W_down, b_down, W_up and b_up.

    One that `output_mask` excludes has shape [0]. The gradient for residual is grad [..., d_out] itself. If z is None,
    it is computed from x. Only the gradient of W_down needs x, and that of b_up needs neither.
    """
    want_x, want_W_down, want_b_down, want_W_up, want_b_up = output_mask
    like_x = grad if x is None else x
    dtype = compute_dtype(grad, like_x, grad if z is None else z, W_down, b_down, W_up)
    W, rows = W_down.to(dtype), scaling * rows_of(grad).to(dtype)
    grad_x, grad_W_down, grad_b_down = like_x.new_empty(0), W_down.new_empty(0), W_down.new_empty(0)
    grad_W_up, grad_b_up = W_down.new_empty(0), W_down.new_empty(0)
    if want_b_up:
        grad_b_up = rows.sum(0).to(W_down.dtype)
    inputs = None if x is None else rows_of(x).to(dtype)
    if z is not None:
        hidden = rows_of(z).to(dtype)
    elif inputs is not None:
        hidden = inputs @ W.t() + b_down.to(dtype)
    else:
        return grad_x, grad_W_down, grad_b_down, grad_W_up, grad_b_up
    if want_W_up:
        h = dropout_of(value(hidden, activation), dropout_p, rng_state)
        grad_W_up = (rows.t() @ h).to(W_up.dtype)
    if want_x or want_W_down or want_b_down:
        grad_z = pull_back(dropout_of(rows @ W_up.to(dtype), dropout_p, rng_state), hidden, activation)
        if want_x:
            grad_x = (grad_z @ W).to(like_x.dtype).reshape(*grad.shape[:-1], W.shape[1])
        if want_W_down and inputs is not None:
            grad_W_down = (grad_z.t() @ inputs).to(W_down.dtype)
        if want_b_down:
            grad_b_down = grad_z.sum(0).to(W_down.dtype)
    return grad_x, grad_W_down, grad_b_down, grad_W_up, grad_b_up
