"""Bottleneck adapters: down, activation, up and residual in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import call_scored, check_number
from safe_kernels.functional.random import state_of_call
from safe_kernels.statistics import AdapterStatistics


def bottleneck(
    x: Tensor,
    residual: Tensor,
    W_down: Tensor,
    b_down: Tensor,
    W_up: Tensor,
    b_up: Tensor,
    activation: str,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    statistics: AdapterStatistics | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Add a bottleneck adapter: ``residual + scaling * (dropout(act(x W_down' + b_down)) W_up' + b_up)``.

    After a sublayer (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2021, arXiv 2005.00247), x and residual are
    both the sublayer's output. In parallel to it (He et al. 2022, arXiv 2110.04366), x is its input and residual its
    output. The op computes in float32 (float64 for float64) and rounds once. Retained bytes depend on the arguments
    that require grad:

    * W_down: x, once for all layers that read it, and with dropout 16 bytes of random state. Backward
      recomputes the pre-activation.
    * otherwise W_up: the pre-activation, or without x and b_down the hidden units, r numbers per row.
    * otherwise x or b_down (a frozen adapter): for "relu" one bit per hidden unit, otherwise the pre-activation. With
      dropout left on 16 bytes more.
    * only residual or b_up: nothing. None of them: there is no graph node.

    Args:
        x: [..., d_in]; float64, float32, bfloat16 or float16, any strides.
        residual: [..., d_out], with the leading dimensions of x. It may be x itself.
        W_down: [r, d_in], any r; may be of higher precision than x.
        b_down: [r]. This and the next two have the dtype of W_down.
        W_up: [d_out, r].
        b_up: [d_out].
        activation: "silu", "gelu" (by erf), "gelu_tanh" or "relu".
        scaling: the factor of the adapter's output.
        dropout_p: probability in [0, 1] that a hidden unit is dropped.
        statistics: the call also computes the sums that score the rows in `statistics.blocks`, and adds them to this.
            The features without the adapter are `residual`. The sums are not differentiable. None: no sums, no cost.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new tensor shaped and typed like `residual`.

    Raises:
        ValueError: The shapes do not fit together, `activation` is unknown, or `dropout_p` is outside [0, 1].
        TypeError: `scaling` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> down, up = torch.nn.Linear(16, 4), torch.nn.Linear(4, 16)
        >>> x = torch.randn(2, 5, 16)
        >>> out = safe_kernels.bottleneck(x, x, down.weight, down.bias, up.weight, up.bias, "relu", 1.0)
        >>> torch.allclose(out, x + up(down(x).relu()), atol=1e-5)
        True
    """
    check_number(scaling, "scaling")
    state = state_of_call(x, dropout_p, rng_state)
    arguments = (x, residual, W_down, b_down, W_up, b_up, activation, scaling, dropout_p, state)
    return call_scored(torch.ops.safe_kernels.bottleneck, arguments, statistics)
