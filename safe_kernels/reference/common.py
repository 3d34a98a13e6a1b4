"""What several formulas share: the dtype of sums, and the factor that dropout multiplies by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safe_kernels.reference.philox import dropout_keep


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype sums are made in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dropout_factor(x: Tensor, dropout_p: float, rng_state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What dropout multiplies x [N, d] by, or None when nothing is dropped."""
    if dropout_p == 0.0 or rng_state is None:
        return None
    keep = dropout_keep(x.shape[0], x.shape[1], dropout_p, rng_state)
    return keep.to(dtype) * (0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p))


def dropped(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in `dtype`."""
    return x.to(dtype) if factor is None else x.to(dtype) * factor


def dropout_of(x: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """Dropout of x [..., d] in its own dtype; the row that decides the bits is that of x flattened to [N, d]."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    factor = dropout_factor(rows, dropout_p, rng_state, x.dtype)
    return x if factor is None else x * factor.reshape(x.shape)
