"""Inverted dropout (Srivastava et al. 2014) with a mask that is computed from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, dropout_of


def dropout(x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
    """Return ``x * keep / (1 - dropout_p)``. The op is linear in x, and its backward is the same call on the gradient.

    Args:
        x: [..., d].
        dropout_p: probability that an element is dropped; 1 drops all.
        rng_state: int64 [2] = (seed, offset).

    Returns:
        A new contiguous tensor shaped and typed like x.
    """
    if dropout_p == 0.0:
        return x.clone(memory_format=torch.contiguous_format)
    return dropout_of(x.to(compute_dtype(x)), dropout_p, rng_state).to(x.dtype).contiguous()
