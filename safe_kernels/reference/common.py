"""Helpers that several formulas share: the dtype of sums, and dropout's factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safe_kernels.reference.philox import dropout_keep, dropout_scale


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums: float64 if any tensor is float64, otherwise float32.

    Raises:
        ValueError: The tensors are on several devices. Some of PyTorch's products do not check this.
    """
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dropout_factor(x: Tensor, dropout_p: float, rng_state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the factor that dropout multiplies x [N, d] by; None if nothing is dropped."""
    if dropout_p == 0.0:
        return None
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if rng_state is None or rng_state.dtype != torch.int64 or rng_state.shape != (2,):
        got = None if rng_state is None else f"{rng_state.dtype} {list(rng_state.shape)}"
        raise ValueError(f"rng_state must be an int64 tensor [2] when dropout_p > 0, got {got}")
    keep = dropout_keep(x.shape[0], x.shape[1], dropout_p, rng_state)
    return keep.to(dtype) * dropout_scale(dropout_p)


def dropped(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``x * factor`` in `dtype`."""
    return x.to(dtype) if factor is None else x.to(dtype) * factor


def rows_of(x: Tensor) -> Tensor:
    """Return x [..., d] as a matrix of rows [N, d]; any dimension may be 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dropout_of(x: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """Apply dropout to x [..., d] in its own dtype; the random bits use the row numbers of x flattened to [N, d]."""
    factor = dropout_factor(rows_of(x), dropout_p, rng_state, x.dtype)
    return x if factor is None else x * factor.reshape(x.shape)
