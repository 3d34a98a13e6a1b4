"""RMSNorm over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import check_number


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, retain_output: bool = True
) -> Tensor:
    """Divide each row by its root mean square: ``x * rstd * (weight + weight_offset)`` (arXiv 1910.07467).

    ``rstd = 1 / sqrt(mean(x^2) + eps)``. The op sums in float32 (float64 for float64) and rounds the result once.
    Retained bytes depend on the arguments that require grad:

    * only x (a frozen weight): the output, which the layers that read it retain anyway, and rstd, 4 bytes per row (8
      for float64). Backward computes the normalised row as ``out / (weight + weight_offset)``.
    * weight, or `retain_output` is False: x and rstd.
    * neither: there is no graph node.

    If ``weight + weight_offset`` has a zero, the output cannot be inverted, and the gradient of x is not finite. The op
    cannot check this, because reading values makes the CPU wait for the device. So the caller must check: pass
    ``retain_output=False`` unless `invertible` returns True. A retained output must not be changed in place.

    Args:
        x: [..., d]; float64, float32, bfloat16 or float16, any strides.
        weight: [d], of any of these dtypes.
        eps: added to the mean of the squares, at least 0.
        weight_offset: added to the weight; 1 for models such as Gemma, which store the difference from 1.
        retain_output: whether backward may be computed from the output.

    Returns:
        A new tensor shaped and typed like `x`; if x is dense, also with the strides of x.

    Raises:
        ValueError: The shapes do not fit together, or `eps` is negative.
        TypeError: `weight_offset` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> x = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> out = safe_kernels.rms_norm(x, torch.ones(2), 1e-6)
        >>> out.sum().backward()
        >>> out.square().mean().round(decimals=3).item(), x.grad.shape
        (1.0, torch.Size([1, 2]))
    """
    check_number(weight_offset, "weight_offset")
    order = _order_in_memory(x)
    if order is None:
        return torch.ops.safe_kernels.rms_norm(x, weight, eps, weight_offset, retain_output)[0]
    out = torch.ops.safe_kernels.rms_norm(x.permute(order), weight, eps, weight_offset, retain_output)[0]
    return out.permute([order.index(dim) for dim in range(x.dim())])


def _order_in_memory(x: Tensor) -> list[int] | None:
    """Return the order of a dense x's dimensions in memory; None if it is their usual order or the last one moves.

    The result has the same order in memory as x, as elementwise code has. So attention heads that are next to each
    other in memory can be joined without a copy.
    """
    if not isinstance(x, Tensor) or x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return order if order[-1] == x.dim() - 1 and x.permute(order).is_contiguous() else None
