"""Activation and dropout in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.random import state_of_call


def activation(x: Tensor, kind: str, *, dropout_p: float = 0.0, rng_state: Tensor | None = None) -> Tensor:
    """Compute ``dropout(act(x))``: SiLU, GELU (arXiv 1606.08415) or ReLU, with dropout in the same pass.

    If x requires grad, autograd retains x, and with dropout 16 bytes of random state. Otherwise there is no graph node.

    A `lora` that trains and reads the result directly retains the same x instead of the result, and recomputes the
    result in backward, under the conditions of `gated_activation`.

    Args:
        x: [..., d], the pre-activation; float64, float32, bfloat16 or float16, any strides. The op computes in float32
            (float64 for float64) and rounds once.
        kind: "silu", "gelu" (by erf), "gelu_tanh" or "relu".
        dropout_p: probability in [0, 1] that an element of the result is dropped.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new contiguous tensor shaped and typed like `x`.

    Raises:
        ValueError: `kind` is unknown, `dropout_p` is outside [0, 1], or x has no dimension.
        TypeError: The dtype is not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> x = torch.tensor([[-1.0, 0.0, 2.0]], requires_grad=True)
        >>> safe_kernels.activation(x, "relu")
        tensor([[0., 0., 2.]], grad_fn=...)
        >>> safe_kernels.activation(x, "gelu").sum().backward()
        >>> x.grad
        tensor([[-0.0833,  0.5000,  1.0852]])
    """
    rng_state = state_of_call(x, dropout_p, rng_state)
    return torch.ops.safe_kernels.activation(x, kind, dropout_p, rng_state)
