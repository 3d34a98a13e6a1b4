"""A linear layer and its LoRA adapter in one op, Hu et al. 2021 (arXiv 2106.09685), eq. 3."""

from __future__ import annotations

from torch import Tensor

from safe_kernels.reference.common import compute_dtype, rows_of
from safe_kernels.reference.lora import lora, lora_backward


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_starts: Tensor | None = None,
    block_rows: int = 0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``x W' + bias + scaling * (dropout(x) A') B'``, rounded once, and the sums that score the adapter.

    The weight is [d_out, d_in], and the bias [d_out]; x and both have one dtype. The rest is as in `lora`.
    """
    dtype = compute_dtype(x, weight, lora_A, lora_B)
    _check(x, weight, bias)
    base = x.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        base = base + bias.to(dtype)
    out, statistics = lora(x, base, lora_A, lora_B, scaling, dropout_p, rng_state, block_starts, block_rows, row_weight)
    return out.to(x.dtype), statistics


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check what PyTorch would broadcast or promote. In inference mode the op's own checks do not run before this."""
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(f"{name} and weight must have one dtype, got {tensor.dtype} and {weight.dtype}; cast it")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape {list(weight.shape[:1])}, got {list(bias.shape)}")


def lora_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients for (x, weight, bias, lora_A, lora_B); one that `output_mask` excludes has shape [0].

    x may be None if only the gradients of x and bias are requested. The rest is as in `lora_backward`.
    """
    want_x, want_weight, want_bias, want_A, want_B = output_mask
    dtype = compute_dtype(grad, weight, lora_A, lora_B)
    rows = rows_of(grad).to(dtype)
    wide = grad.to(dtype)
    # In the dtype of sums, so that the sum of the two parts of grad_x is rounded once.
    inputs = None if x is None else x.to(dtype)
    grad_x, grad_A, grad_B = lora_backward(
        wide, inputs, lora_A, lora_B, scaling, dropout_p, rng_state, [want_x, want_A, want_B]
    )
    grad_x = (grad_x + wide @ weight.to(dtype)).to(weight.dtype).contiguous() if want_x else weight.new_empty(0)
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if want_weight and x is not None:
        grad_weight = (rows.t() @ rows_of(x).to(dtype)).to(weight.dtype)
    if want_bias:
        grad_bias = rows.sum(0).to(weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_A, grad_B
