"""LoRA on a convolution, in PEFT's form: lora_A is a convolution with the base layer's kernel, lora_B has size 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from safe_kernels.reference.common import compute_dtype, dropout_of


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Return ``conv(x, weight, bias) + scaling * conv(conv(dropout(x), lora_A), lora_B)``.

    Args:
        x: [N, d_in, *positions] or [d_in, *positions], with 1 to 3 dimensions of positions.
        weight: [d_out, d_in / groups, *kernel], any dtype; the base convolution is computed in the dtype of x.
        bias: [d_out], or None.
        lora_A: [r, d_in, *kernel]; it has no groups, but the steps of the base layer.
        lora_B: [d_out, r / groups, 1, ...].
        scaling: as in `lora`.
        stride: one number per dimension of positions.
        padding: the same; zeros are added.
        dilation: the same.
        groups: of weight and lora_B.
        dropout_p: as in `lora`.
        rng_state: as in `lora`; a row of the mask is a channel of a sample.

    Returns:
        [N, d_out, *positions] or without N, typed like x, in the memory format of the base convolution.
    """
    dtype = compute_dtype(x, weight, lora_A, lora_B)
    wide, steps = _batched(x, weight).to(dtype), (stride, padding, dilation)
    base = _conv(wide, weight.to(dtype), None if bias is None else bias.to(dtype), steps, groups)
    h = _conv(_dropped(wide, dropout_p, rng_state), lora_A.to(dtype), None, steps, 1)
    out = (base + scaling * _conv(h, lora_B.to(dtype), None, _steps_of_B(weight), groups)).to(x.dtype)
    out = out.contiguous(memory_format=_format_of(wide, weight))
    return out if x.dim() == out.dim() else out.squeeze(0)


def lora_conv_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    x_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `lora_conv` for x, lora_A and lora_B; one that `output_mask` excludes has shape [0].

    `x` may be None if only grad_x is requested, which depends on its shape `x_size` alone. grad_x is typed like `grad`.
    """
    want_x, want_A, want_B = output_mask
    dtype = compute_dtype(grad, weight, lora_A, lora_B)
    A, B, steps = lora_A.to(dtype), lora_B.to(dtype), (stride, padding, dilation)
    grads = _batched(grad, weight).to(dtype)
    size = list(x_size) if len(x_size) == grads.dim() else [1, *x_size]
    wide = grads.new_empty(size) if x is None else _batched(x, weight).to(dtype)
    y = _dropped(wide, dropout_p, rng_state)
    h = _conv(y, A, None, steps, 1)
    grad_h, grad_B = _conv_backward(grads, h, B, _steps_of_B(weight), groups)
    grad_y, grad_A = _conv_backward(scaling * grad_h, y, A, steps, 1)
    grad_x = _conv_backward(grads, wide, weight.to(dtype), steps, groups)[0] + _dropped(grad_y, dropout_p, rng_state)
    like_x = grads if x is None else wide
    grad_x = grad_x.to(grad.dtype).contiguous(memory_format=_format_of(like_x, weight))
    grad_x = grad_x if grads.dim() == grad.dim() else grad_x.squeeze(0)
    return (
        grad_x if want_x else grad.new_empty(0),
        grad_A.to(lora_A.dtype).contiguous() if want_A else lora_A.new_empty(0),
        (scaling * grad_B).to(lora_B.dtype).contiguous() if want_B else lora_B.new_empty(0),
    )


_Steps = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _steps_of_B(weight: Tensor) -> _Steps:
    positions = weight.dim() - 2
    return [1] * positions, [0] * positions, [1] * positions


def _format_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    formats = suggest_memory_format(x), suggest_memory_format(weight)
    return formats[1] if formats[0] == torch.contiguous_format else formats[0]


def _batched(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor if tensor.dim() == weight.dim() else tensor.unsqueeze(0)


def _dropped(x: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    return dropout_of(x.flatten(2), dropout_p, rng_state).reshape(x.shape)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, steps: _Steps, groups: int) -> Tensor:
    return torch.convolution(x, weight, bias, *steps, False, [0] * (weight.dim() - 2), groups)


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, steps: _Steps, groups: int) -> tuple[Tensor, Tensor]:
    no_padding, mask = [0] * (weight.dim() - 2), [True, True, False]
    op = torch.ops.aten.convolution_backward
    grad_x, grad_weight, _ = op(grad, x, weight, None, *steps, False, no_padding, groups, mask)
    return grad_x, grad_weight
