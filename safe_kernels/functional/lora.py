"""LoRA over any base layer."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import call_adapter
from safe_kernels.statistics import AdapterStatistics


def lora(
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    statistics: AdapterStatistics | None = None,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Add a LoRA adapter to a base layer's output: ``base + scaling * (dropout(x) A') B'`` (arXiv 2106.09685).

    The base layer can have any type (linear, convolution over the sequence, quantised), because the op reads only its
    output. Retained bytes depend on the arguments that require grad:

    * lora_A or lora_B: x, once for all layers that read it, and with dropout 16 bytes of random state. The op retains
      no mask, no copy with dropout applied, and no copy of x in another dtype.
    * only x or base (a frozen adapter): only lora_A and lora_B themselves.
    * none: there is no graph node.

    Args:
        x: [..., d_in], the layer's input; float64, float32, bfloat16 or float16, any strides.
        base: [..., d_out], the base layer's output for x.
        lora_A: [r, d_in], any r; may be of higher precision than x.
        lora_B: [d_out, r], of the dtype of lora_A.
        scaling: lora_alpha / r, or / sqrt(r) for rsLoRA.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into the adapter.
        statistics: the call also computes the sums that score the rows in `statistics.blocks`, and adds them to this.
            The sums are not differentiable. None: no sums, and no cost.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new tensor shaped and typed like `base`.

    Raises:
        ValueError: The shapes do not fit together, or `dropout_p` is outside [0, 1].
        TypeError: `scaling` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> layer = torch.nn.Linear(16, 32).requires_grad_(False)
        >>> A, B = torch.randn(4, 16, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
        >>> x = torch.randn(2, 5, 16)
        >>> out = safe_kernels.lora(x, layer(x), A, B, 2.0, dropout_p=0.1)
        >>> out.sum().backward()
        >>> out.shape, B.grad.shape
        (torch.Size([2, 5, 32]), torch.Size([32, 4]))
    """
    tensors = (x, base, lora_A, lora_B)
    return call_adapter(torch.ops.safe_kernels.lora, tensors, scaling, dropout_p, rng_state, statistics)
