"""Dropout that retains its seed."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.random import draw_rng_state


def dropout(x: Tensor, dropout_p: float, *, rng_state: Tensor | None = None) -> Tensor:
    """Drop elements of x and scale the others by ``1 / (1 - dropout_p)`` (Srivastava et al. 2014).

    Backward recomputes the mask from the random state. So autograd retains only 16 bytes, and neither x nor a mask. The
    result can be differentiated any number of times. The op always drops: call it only in training. With ``dropout_p``
    0 it returns a copy.

    Args:
        x: [..., d]; float64, float32, bfloat16 or float16, any strides.
        dropout_p: probability in [0, 1] that an element is dropped; 1 drops all. It is rounded to a multiple of
            ``2**-16``, both for the mask and for the scale, so that the expectation of the result is x.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new contiguous tensor shaped and typed like `x`.

    Raises:
        ValueError: `dropout_p` is outside [0, 1], or x has no dimension.
        TypeError: The dtype is not supported.

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
