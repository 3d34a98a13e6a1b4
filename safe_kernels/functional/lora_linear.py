"""A linear layer and its LoRA adapter in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import call_adapter
from safe_kernels.statistics import AdapterStatistics


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    statistics: AdapterStatistics | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Compute a linear layer with its LoRA adapter: ``x W' + bias + scaling * (dropout(x) A') B'`` (arXiv 2106.09685).

    On a GPU with Triton, the adapter is added inside the product of x and weight, so the layer's output without the
    adapter is never stored. On a CPU it is PyTorch's product with weight, and `lora` over that.

    Retained bytes depend on the arguments that require grad:

    * weight, lora_A or lora_B: x, once for all layers that read it, and with dropout 16 bytes of random state.
    * only x or bias (a frozen adapter): only weight, lora_A and lora_B themselves.
    * none: there is no graph node.

    Args:
        x: [..., d_in], the layer's input; float64, float32, bfloat16 or float16, any strides.
        weight: [d_out, d_in], of the dtype of x.
        bias: [d_out], or None.
        lora_A: [r, d_in], any r; may be of higher precision than x.
        lora_B: [d_out, r], of the dtype of lora_A.
        scaling: lora_alpha / r, or / sqrt(r) for rsLoRA.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into the adapter.
        statistics: the call also computes the sums that score the rows in `statistics.blocks`, and adds them to this.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new tensor [..., d_out], typed like `x`.

    Raises:
        ValueError: The shapes do not fit together, or `dropout_p` is outside [0, 1].
        TypeError: `scaling` is a tensor that requires grad, a dtype is not supported, or x, weight and bias differ in
            dtype.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> layer = torch.nn.Linear(16, 32).requires_grad_(False)
        >>> A, B = torch.randn(4, 16, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
        >>> x = torch.randn(2, 5, 16)
        >>> out = safe_kernels.lora_linear(x, layer.weight, layer.bias, A, B, 2.0, dropout_p=0.1)
        >>> torch.allclose(out, layer(x), atol=1e-6)  # lora_B is zero
        True
    """
    tensors = (x, weight, bias, lora_A, lora_B)
    return call_adapter(torch.ops.safe_kernels.lora_linear, tensors, scaling, dropout_p, rng_state, statistics)
