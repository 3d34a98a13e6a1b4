"""LoRA over any base layer."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.checks import check_number, check_statistics
from safe_kernels.functional.random import state_of_call
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
    """Adds a LoRA adapter to a base layer's output: ``base + scaling * (dropout(x) A') B'`` (arXiv 2106.09685).

    The base layer may be anything (linear, convolution over sequence, quantised), since only its output is taken.
    What autograd retains follows from which arguments require grad:

    * lora_A or lora_B does: x, once however many layers read it, and with dropout 16 bytes of random state. No mask, no
      dropped copy, no copy of x in another dtype.
    * only x or base does (a frozen adapter): nothing but lora_A and lora_B themselves.
    * none does: there is no graph node.

    Args:
        x: [..., d_in], the layer's input; float64, float32, bfloat16 or float16, any strides.
        base: [..., d_out], the base layer's output for x.
        lora_A: [r, d_in], any r; may be of higher precision than x.
        lora_B: [d_out, r], of the dtype of lora_A.
        scaling: lora_alpha / r, or / sqrt(r) for rsLoRA.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into the adapter.
        statistics: scores the rows that `statistics.blocks` names, in the same call, and adds the sums to it. Not
            differentiable, and free when None.
        rng_state: int64 [2], Philox seed and offset; drawn from torch's generator when None.

    Returns:
        A new tensor shaped and typed like `base`.

    Raises:
        ValueError: shapes do not fit together, or `dropout_p` is outside [0, 1].
        TypeError: `scaling` is a tensor that requires grad, or a dtype is not supported.
        RuntimeError: the result is differentiated twice, which is not supported.

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
    check_number(scaling, "scaling")
    check_statistics(statistics)
    rng_state = state_of_call(x, dropout_p, rng_state)
    if statistics is None or statistics.blocks is None:
        return torch.ops.safe_kernels.lora(x, base, lora_A, lora_B, scaling, dropout_p, rng_state)[0]
    blocks = statistics.blocks
    out, sums = torch.ops.safe_kernels.lora(
        x,
        base,
        lora_A,
        lora_B,
        scaling,
        dropout_p,
        rng_state,
        blocks.starts,
        blocks.block_rows,
        blocks.row_weight,
    )
    statistics.add_(sums)
    return out
