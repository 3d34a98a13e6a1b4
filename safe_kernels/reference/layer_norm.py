"""LayerNorm, Ba, Kiros and Hinton 2016 (arXiv 1607.06450), eq. 4, over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, rows_of


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, retain_output: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(x - mean) * rstd * weight + bias``, ``rstd = 1 / sqrt(mean((x - mean)^2) + eps)``, rounded once.

    x is [..., d]; weight and bias are [d], or None for ones and zeros. Mean and rstd [...] are returned too, in the
    dtype of sums. Nothing depends on `retain_output`, which only autograd reads: whether out may be retained instead of
    x.
    """
    dtype = _dtype(x, weight, bias)
    values = x.to(dtype)
    mean = values.mean(-1)
    centred = values - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    out = centred * rstd.unsqueeze(-1)
    if weight is not None:
        out = out * weight.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def layer_norm_backward(
    grad: Tensor,
    retained: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    from_output: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `layer_norm` for x, weight and bias; one that `output_mask` excludes has shape [0].

    `retained` is x, or the output if `from_output`; then the mean is not needed, and no element of weight may be zero.
    With ``x_hat = (x - mean) * rstd``, or ``(out - bias) / weight``, and ``g = grad * weight``::

        grad_x = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
        grad_weight = sum over rows of grad * x_hat
        grad_bias = sum over rows of grad
    """
    dtype = _dtype(retained, weight, bias)
    row_rstd = rstd.to(dtype).unsqueeze(-1)
    if from_output or mean is None:
        x_hat = _inverted(retained.to(dtype), weight, bias, dtype)
    else:
        x_hat = (retained.to(dtype) - mean.to(dtype).unsqueeze(-1)) * row_rstd
    grads = grad.to(dtype)
    rows = rows_of(grads)
    grad_x = retained.new_empty(0)
    grad_weight = (retained if weight is None else weight).new_empty(0)
    grad_bias = (retained if bias is None else bias).new_empty(0)
    if output_mask[0]:
        g = grads if weight is None else grads * weight.to(dtype)
        along = (g * x_hat).mean(-1, keepdim=True)
        grad_x = (row_rstd * (g - g.mean(-1, keepdim=True) - x_hat * along)).to(retained.dtype).contiguous()
    if output_mask[1] and weight is not None:
        grad_weight = (rows * rows_of(x_hat)).sum(0).to(weight.dtype)
    if output_mask[2] and bias is not None:
        grad_bias = rows.sum(0).to(bias.dtype)
    return grad_x, grad_weight, grad_bias


def _inverted(out: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute the normalised row from the output."""
    centred = out if bias is None else out - bias.to(dtype)
    return centred if weight is None else centred / weight.to(dtype)


def _dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    return compute_dtype(*(tensor for tensor in (x, weight, bias) if tensor is not None))
