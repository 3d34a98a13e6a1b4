"""LayerNorm over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, retain_output: bool = True
) -> Tensor:
    """Centre each row and divide it by its deviation: ``(x - mean) * rstd * weight + bias`` (arXiv 1607.06450).

    ``rstd = 1 / sqrt(mean((x - mean)^2) + eps)``. The op sums in float32 (float64 for float64) and rounds the result
    once. Retained bytes depend on the arguments that require grad:

    * only x (frozen weight and bias): the output, which the layers that read it retain anyway, and rstd, 4 bytes per
      row (8 for float64). Backward computes the normalised row as ``(out - bias) / weight``.
    * weight or bias, or `retain_output` is False: x, mean and rstd.
    * none: there is no graph node.

    If weight has a zero, the output cannot be inverted, and the gradient of x is not finite. If bias is much larger
    than weight, the rounding of the output hides the normalised row. The op cannot check this, because reading values
    makes the CPU wait for the device. So the caller must check: pass ``retain_output=False`` unless `invertible`
    returns True. A retained output must not be changed in place.

    Args:
        x: [..., d]; float64, float32, bfloat16 or float16, any strides.
        weight: [d], of any of these dtypes; None for ones.
        bias: [d], of any of these dtypes; None for zeros.
        eps: added to the variance, at least 0.
        retain_output: whether backward may be computed from the output.

    Returns:
        A new tensor shaped and typed like `x`.

    Raises:
        ValueError: The shapes do not fit together, or `eps` is negative.
        TypeError: A dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
        >>> out = safe_kernels.layer_norm(x, torch.ones(3), torch.zeros(3), 1e-5)
        >>> out.square().sum().backward()
        >>> out.sum().abs().item() < 1e-6, x.grad.shape
        (True, torch.Size([1, 3]))
    """
    return torch.ops.safe_kernels.layer_norm(x, weight, bias, eps, retain_output)[0]
