"""The last layer of a language model and its cross entropy, with the gradient for the layer's input in the same pass.

The gradient of a softmax's cross entropy is ``softmax(z) - onehot`` (Bridle 1990). Gemma 2's report (arXiv 2408.00118,
section 2) has the soft cap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, rows_of


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int = -100,
    scaling: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Return each row's loss ``logsumexp(z) - z[target]``; zero if its target is `ignore_index`.

    ``u = scaling * (x weight' + bias)``. ``z = u``, or ``softcap * tanh(u / softcap)`` if `softcap` is not zero.

    Args:
        x: [..., d].
        weight: [classes, d].
        bias: [classes], or None.
        target: int64 [...], in [0, classes) or `ignore_index`.
        ignore_index: the target of rows without a loss.
        scaling: a factor of the logits.
        softcap: the bound of the logits; 0 for none.

    Returns:
        The losses [...], in the dtype of sums.
    """
    return _losses(_logits(x, weight, bias, scaling, softcap), target, ignore_index)


def linear_cross_entropy_backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, scaling: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Return the losses, and the gradient of each row's loss for x, shaped and typed like x.

    ``grad_x = scaling * ((softmax(z) - onehot(target)) * dz/du) weight``; ``dz/du = 1 - (z / softcap)^2``, or 1.
    """
    logits = _logits(x, weight, bias, scaling, softcap)
    counts, classes = _read(target, ignore_index)
    grads = logits.softmax(-1)
    grads = grads.scatter(-1, classes.unsqueeze(-1), grads.gather(-1, classes.unsqueeze(-1)) - 1.0)
    if softcap:
        grads = grads * (1.0 - (logits / softcap).square())
    grad_x = (rows_of(grads) @ weight.to(grads.dtype) * scaling).to(x.dtype).reshape(x.shape)
    return _losses(logits, target, ignore_index), grad_x.where(counts.unsqueeze(-1), 0.0)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: float, softcap: float) -> Tensor:
    dtype = compute_dtype(x, weight)
    rows = rows_of(x).to(dtype) @ weight.to(dtype).mT
    logits = (scaling * (rows if bias is None else rows + bias.to(dtype))).reshape(*x.shape[:-1], weight.shape[0])
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _read(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return which rows count, and the targets, with 0 where they do not."""
    counts = target != ignore_index
    return counts, target.where(counts, 0)


def _losses(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    counts, classes = _read(target, ignore_index)
    losses = logits.logsumexp(-1) - logits.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    return losses.where(counts, 0.0).contiguous()
