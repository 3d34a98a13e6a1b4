"""RMSNorm, Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, rows_of


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0, retain_output: bool = True
) -> tuple[Tensor, Tensor]:
    """Return ``x * rstd * (weight + weight_offset)``, ``rstd = 1 / sqrt(mean(x^2) + eps)``, rounded once at the end.

    x is [..., d], and weight [d]. rstd [...] is returned too, in the dtype of sums. Nothing depends on `retain_output`,
    which only autograd reads: whether out may be retained instead of x.
    """
    dtype = compute_dtype(x, weight)
    values = x.to(dtype)
    rstd = torch.rsqrt(values.square().mean(-1) + eps)
    out = values * rstd.unsqueeze(-1) * (weight.to(dtype) + weight_offset)
    return out.to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_backward(
    grad: Tensor,
    retained: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    from_output: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `rms_norm` for x and weight; one that `output_mask` excludes has shape [0].

    `retained` is x, or the output if `from_output`; then no element of ``weight + weight_offset`` may be zero. With
    ``x_hat = x * rstd``, or ``out / (weight + weight_offset)``, and ``g = grad * (weight + weight_offset)``::

        grad_x = rstd * (g - x_hat * mean(g * x_hat))
        grad_weight = sum over rows of grad * x_hat
    """
    dtype = compute_dtype(retained, weight)
    scale = weight.to(dtype) + weight_offset
    row_rstd = rstd.to(dtype).unsqueeze(-1)
    x_hat = retained.to(dtype) / scale if from_output else retained.to(dtype) * row_rstd
    grad_x, grad_weight = retained.new_empty(0), weight.new_empty(0)
    if output_mask[0]:
        g = grad.to(dtype) * scale
        grad_x = (row_rstd * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))).to(retained.dtype).contiguous()
    if output_mask[1]:
        grad_weight = rows_of(grad.to(dtype) * x_hat).sum(0).to(weight.dtype)
    return grad_x, grad_weight
