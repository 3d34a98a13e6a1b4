"""RMSNorm over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import check_number


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, retain_output: bool = True
) -> Tensor:
    """Divides each row by its root mean square: ``x * rstd * (weight + weight_offset)`` (arXiv 1910.07467).

    ``rstd = 1 / sqrt(mean(x^2) + eps)``. Sums are made in float32 (float64 for float64), and the result is rounded
    once. What autograd retains follows from which arguments require grad:

    * only x does (a frozen weight): the output, which the layers that read it retain anyway, and rstd, 4 bytes per row
      (8 for float64). Backward finds the normalised row again as ``out / (weight + weight_offset)``.
    * weight does, or `retain_output` is False: x and rstd.
    * neither does: there is no graph node.

    Where ``weight + weight_offset`` has a zero the output cannot be inverted, and the gradient of x would not be
    finite. The op cannot look at values without stopping a device, so the caller has to: pass ``retain_output=False``
    unless `invertible` says that the output may be retained. A retained output must not be changed in place.

    Args:
        x: [..., d]; float64, float32, bfloat16 or float16, any strides.
        weight: [d], of any of these dtypes.
        eps: added to the mean of the squares, at least 0.
        weight_offset: added to the weight: 1 where a model stores the difference from 1, as Gemma does.
        retain_output: whether backward may be made from the output.

    Returns:
        A new tensor shaped and typed like `x`, and with its strides where x is dense.

    Raises:
        ValueError: shapes do not fit together, or `eps` is negative.
        TypeError: `weight_offset` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: the result is differentiated twice, which is not supported.

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
    """How the dimensions of a dense x lie in memory, where that is not their own order; the last stays the last.

    The result lies in memory as x does, as that of elementwise code: attention heads that are one after another there
    need no copy when they are joined.
    """
    if not isinstance(x, Tensor) or x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return order if order[-1] == x.dim() - 1 and x.permute(order).is_contiguous() else None
