"""The gated activation of a transformer's MLP in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels.functional.random import state_of_call


def gated_activation(
    gate: Tensor, up: Tensor, kind: str, *, dropout_p: float = 0.0, rng_state: Tensor | None = None
) -> Tensor:
    """Compute ``dropout(act(gate) * up)``: SwiGLU, GeGLU or ReGLU (arXiv 2002.05202), with dropout in the same pass.

    Retained bytes depend on the arguments that require grad:

    * gate: gate and up, and with dropout 16 bytes of random state; no activation, no product, no mask.
    * only up: gate and the random state.
    * none: there is no graph node.

    Gate and up may be halves of one tensor (``chunk(2, -1)``). This tensor is then retained without a copy.

    A `lora` that trains and reads the result directly retains gate and up instead of the result, and recomputes the
    result in backward. It retains the result itself in three cases: gate, up or the result was changed in place; the
    result was detached (``.data``, ``.detach()``), so that PyTorch cannot detect a change; `lora` reads a view of it.

    The result keeps gate and up alive, even if saved-tensor hooks move the retained tensors to another place.

    Args:
        gate: [..., d], the pre-activation; float64, float32, bfloat16 or float16, any strides. The op computes in
            float32 (float64 for float64) and rounds once.
        up: [..., d], the factor of the activation; of the shape and dtype of gate.
        kind: "silu", "gelu" (by erf), "gelu_tanh" or "relu".
        dropout_p: probability in [0, 1] that an element of the result is dropped.
        rng_state: int64 [2], Philox seed and offset; None: drawn from torch's generator.

    Returns:
        A new contiguous tensor shaped and typed like `gate`.

    Raises:
        ValueError: `kind` is unknown, shapes differ, `dropout_p` is outside [0, 1], or there is no dimension.
        TypeError: The dtypes differ or are not supported.
        RuntimeError: The result is differentiated twice, which is not supported.

    Example:
        >>> import torch, safe_kernels
        >>> gate, up = torch.randn(2, 5, 16, requires_grad=True).chunk(2, -1)
        >>> out = safe_kernels.gated_activation(gate, up, "silu")
        >>> torch.allclose(out, torch.nn.functional.silu(gate) * up, atol=1e-6)
        True
    """
    rng_state = state_of_call(gate, dropout_p, rng_state)
    return torch.ops.safe_kernels.gated_activation(gate, up, kind, dropout_p, rng_state)
