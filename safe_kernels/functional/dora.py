"""A linear layer and its DoRA adapter in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import check_number
from safe_kernels.functional.random import state_of_call


def dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Compute a linear layer with its DoRA adapter: ``scale * x (W + scaling * B A)' + bias`` (arXiv 2402.09353).

    ``scale = magnitude / norm``, and norm is the norm of each row of ``W + scaling * B A``. Every call computes it from
    a few rows at a time, so that no second weight is stored. It is a constant for the gradients. As in PEFT, dropout
    acts on everything except ``x W' + bias``, also on ``(scale - 1) * dropout(x) W'``.

    Retained bytes depend on the arguments that require grad:

    * lora_A, lora_B or magnitude: x, once for all layers that read it, with dropout 16 bytes of random state, and norm.
      Backward multiplies by weight again for the gradient of magnitude.
    * only x (a frozen adapter): norm, one number per row of weight.
    * only bias: nothing. None of them: there is no graph node.

    Args:
        x: [..., d_in], the layer's input; float64, float32, bfloat16 or float16, any strides.
        weight: [d_out, d_in], without requires_grad; products with it are computed in the dtype of x.
        bias: [d_out], or None.
        lora_A: [r, d_in], any r; may be of higher precision than x.
        lora_B: [d_out, r], of the dtype of lora_A.
        magnitude: [d_out].
        scaling: lora_alpha / r, or / sqrt(r) for rsLoRA.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into the adapter.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new tensor [..., d_out], typed like `x`.

    Raises:
        ValueError: The shapes do not fit together, `dropout_p` is outside [0, 1], or `weight` requires grad.
        TypeError: `scaling` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> layer = torch.nn.Linear(16, 32).requires_grad_(False)
        >>> A, B = torch.randn(4, 16, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
        >>> magnitude = layer.weight.norm(dim=1).requires_grad_()
        >>> x = torch.randn(2, 5, 16)
        >>> out = safe_kernels.dora(x, layer.weight, layer.bias, A, B, magnitude, 2.0, dropout_p=0.1)
        >>> torch.allclose(out, layer(x), atol=1e-5)  # the new adapter changes nothing
        True
    """
    check_number(scaling, "scaling")
    rng_state = state_of_call(x, dropout_p, rng_state)
    op = torch.ops.safe_kernels.dora
    return op(x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p, rng_state)[0]
