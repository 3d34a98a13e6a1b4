"""Rotary position embedding in one pass."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool = False) -> Tensor:
    """Rotate queries or keys by their positions: ``x * cos + rotate_half(x) * sin`` (arXiv 2104.09864, eq. 34).

    ``rotate_half`` of a head's halves ``(x1, x2)`` is ``(-x2, x1)``, as in transformers. The op computes in float32
    (float64 for float64) and rounds once. It retains cos and sin, which the layers of a model share, and nothing of its
    own. The result can be differentiated any number of times.

    Args:
        x: [batch, heads, tokens, d]; float64, float32, bfloat16 or float16, any strides.
        cos: [1 or batch, tokens, r], r even and at most d; the features of x from r on are copied. Any of these dtypes.
        sin: as cos.
        transposed: multiply by the transposed matrix instead, as backward does. It undoes the rotation where
            ``cos^2 + sin^2`` is 1.

    Returns:
        A new tensor shaped and typed like `x`. In memory it has tokens before heads, as queries and keys usually have.

    Raises:
        ValueError: The shapes do not fit together.
        TypeError: A dtype is not supported, or cos and sin have different ones.
        NotImplementedError: `cos` or `sin` requires grad.

    Example:
        >>> import torch, safe_kernels
        >>> x, angle = torch.randn(2, 4, 5, 8), torch.rand(1, 5, 4).repeat(1, 1, 2)
        >>> out = safe_kernels.rotary(x, angle.cos(), angle.sin())
        >>> torch.allclose(out.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
        True
    """
    rows = x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x
    return torch.ops.safe_kernels.rotary(rows, cos, sin, transposed).transpose(1, 2)
