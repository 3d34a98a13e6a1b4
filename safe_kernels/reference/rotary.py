"""Rotary position embedding, Su et al. 2021 (arXiv 2104.09864), eq. 34; pairs are the halves of a head's features."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """Rotate the first r features of each head, and copy the others; rounded once at the end.

    x is [batch, tokens, heads, d]; cos and sin are [1 or batch, tokens, r] with an even r of at most d. With the halves
    ``x1, x2`` of the r features, and the halves of cos and sin::

        out1 = x1 * cos1 - x2 * sin1          transposed: x1 * cos1 + x2 * sin2
        out2 = x2 * cos2 + x1 * sin2                      x2 * cos2 - x1 * sin1

    The op is linear in x, and its backward is the transposed op on the gradient. The result is contiguous.
    """
    dtype, width = compute_dtype(x, cos, sin), cos.shape[-1]
    values, cos, sin = x[..., :width].to(dtype), cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
    if transposed:
        first, second = (values * sin).chunk(2, -1)
        turned = values * cos + torch.cat((second, -first), -1)
    else:
        first, second = values.chunk(2, -1)
        turned = values * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)
