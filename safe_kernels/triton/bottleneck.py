"""Bottleneck adapters on a GPU, by the kernels of `lora` and `activation`.

Each layer is a `lora` whose other matrix is the identity: down is ``b_down + x W_down' I'``, up is
``residual + scaling * (h I') W_up'``. The ops are called through the dispatcher, which replays their launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.runtime.host import flat, require_shape, served_by


@served_by(reference.bottleneck)
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
    require_shape("W_down", W_down, (W_up.shape[1], x.shape[-1]))
    require_shape("b_down", b_down, W_down.shape[:1])
    require_shape("b_up", b_up, W_up.shape[:1])
    require_shape("residual", residual, (*x.shape[:-1], W_up.shape[0]))
    ops = torch.ops.safe_kernels
    with torch._C._DisableAutocast():
        z = _down(x, W_down, b_down)
        h = ops.activation(z, activation, dropout_p, rng_state)
        base = residual + (scaling * b_up.float()).to(residual.dtype)
        rows = (block_starts, block_rows, row_weight)
        out, sums = ops.lora(h, base, _identity(W_down), W_up, scaling, 0.0, None, *rows)
    return out, z, sums


@served_by(reference.bottleneck_backward)
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
    wants_x, wants_W_down, wants_b_down, wants_W_up, wants_b_up = output_mask
    wants_slope = wants_x or wants_W_down or wants_b_down
    ops, like_x = torch.ops.safe_kernels, grad if x is None else x
    grad_x, grad_W_down, grad_W_up = (like.new_empty(0) for like in (like_x, W_down, W_up))
    grad_b_down, grad_b_up = b_down.new_empty(0), b_down.new_empty(0)
    with torch._C._DisableAutocast():
        if wants_b_up:
            grad_b_up = (scaling * flat(grad).sum(0, dtype=torch.float32)).to(b_down.dtype)
        if wants_slope or wants_W_up:
            z = _down(x, W_down, b_down) if z is None and x is not None else z
            h = ops.activation(z, activation, dropout_p, rng_state)
            identity = _identity(W_down)
            wanted = [wants_slope, False, wants_W_up]
            grad_h, _, grad_W_up = ops.lora_backward(grad, h, identity, W_up, scaling, 0.0, None, wanted)
        if wants_slope:
            grad_z = ops.activation_backward(grad_h, z, activation, dropout_p, rng_state)
            wanted = [wants_x, wants_W_down, False]
            grad_x, grad_W_down, _ = ops.lora_backward(grad_z, x, W_down, identity, 1.0, 0.0, None, wanted)
            if wants_b_down:
                grad_b_down = flat(grad_z).sum(0, dtype=torch.float32).to(b_down.dtype)
    return grad_x.to(like_x.dtype), grad_W_down, grad_b_down, grad_W_up, grad_b_up


def _down(x: Tensor, W_down: Tensor, b_down: Tensor) -> Tensor:
    """The pre-activation [..., r]."""
    base = b_down.to(torch.promote_types(x.dtype, W_down.dtype)).expand(*x.shape[:-1], W_down.shape[0])
    z: Tensor = torch.ops.safe_kernels.lora(x, base, W_down, _identity(W_down), 1.0)[0]
    return z


def _identity(W_down: Tensor) -> Tensor:
    """[r, r], of the weights' dtype."""
    return torch.eye(W_down.shape[0], dtype=W_down.dtype, device=W_down.device)
