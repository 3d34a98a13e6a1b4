"""A frozen last layer and the cross entropy of its output, without the logits of all rows in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    scaling: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Compute each row's cross entropy ``logsumexp(z) - z[target]`` of the logits ``z = x weight' + bias``.

    Rows are computed in chunks, so the logits of all rows are never in memory. If x requires grad, the same pass
    computes the gradient of x (``softmax(z) - onehot``, times weight). Autograd retains this gradient, d numbers per
    row in the dtype of x, and nothing else. Without a gradient there is no graph node. Products are in the dtype of x,
    the softmax and the losses in float32 (float64 for float64). On a CPU, ignored rows are skipped.

    The op computes no gradient of the layer. Divide the sum by the number of tokens that count to get the mean loss::

        loss = linear_cross_entropy(x, weight, None, target).sum() / (target != -100).sum()

    Args:
        x: [..., d]; float64, float32, bfloat16 or float16, any strides.
        weight: [classes, d], in the dtype of x; must not require grad.
        bias: [classes], in the dtype of x, or None; must not require grad.
        target: int64 [...], in [0, classes) or `ignore_index`. A language model's labels are shifted by the caller.
        ignore_index: the target of rows whose loss and gradient are zero.
        scaling: a factor of the logits, as Cohere and Granite have it.
        softcap: if not zero, the logits become ``softcap * tanh(z / softcap)`` after the scaling, as in Gemma 2.

    Returns:
        The losses, shaped like `target`.

    Raises:
        ValueError: The shapes do not fit together, `softcap` is negative, or the layer requires grad.
        TypeError: A dtype is not supported.
        IndexError: A target is out of range (on a GPU, an assertion of the device).
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> x, weight = torch.ones(2, 3, requires_grad=True), torch.eye(4, 3)
        >>> losses = safe_kernels.linear_cross_entropy(x, weight, None, torch.tensor([1, -100]))
        >>> losses.sum().backward()
        >>> [round(loss, 3) for loss in losses.tolist()], x.grad[1].tolist()
        ([1.214, 0.0], [0.0, 0.0, 0.0])
    """
    return torch.ops.safe_kernels.linear_cross_entropy(x, weight, bias, target, ignore_index, scaling, softcap)
