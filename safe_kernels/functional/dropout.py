"""Dropout that retains its seed."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.random import draw_rng_state


def dropout(x: Tensor, dropout_p: float, *, rng_state: Tensor | None = None) -> Tensor:
    """Drops elements of x and scales the others by ``1 / (1 - dropout_p)`` (Srivastava et al. 2014).

    Backward makes the mask again from the random state, so autograd retains those 16 bytes and neither x nor a mask.
    May be differentiated any number of times. Whether a model is in training is for the caller to know: the op drops
    whenever it is called, and at ``dropout_p`` 0 copies.

    Args:
        x: [..., d]; float64, float32, bfloat16 or float16, any strides.
        dropout_p: probability in [0, 1] that an element is dropped, in steps of ``2**-24``; 1 drops all.
        rng_state: int64 [2], Philox seed and offset; drawn from torch's generator when None.

    Returns:
        A new contiguous tensor shaped and typed like `x`.

    Raises:
        ValueError: `dropout_p` is outside [0, 1], or x has no dimension.
        TypeError: the dtype is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> x = torch.ones(100, 100)
        >>> out = safe_kernels.dropout(x, 0.5)
        >>> out.unique(), 0.4 < out.count_nonzero().item() / 10000 < 0.6
        (tensor([0., 2.]), True)
    """
    if rng_state is None and isinstance(x, Tensor):
        rng_state = draw_rng_state(x.device)
    return torch.ops.safe_kernels.dropout(x, dropout_p, rng_state)
