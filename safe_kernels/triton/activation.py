"""Plain activations with dropout on a GPU, with the kernels of safe_kernels/triton/gated_activation.py."""

from __future__ import annotations

from torch import Tensor

from safe_kernels import reference
from safe_kernels.triton.gated_activation import gated_activation, gated_activation_backward
from safe_kernels.triton.runtime.host import served_by


@served_by(reference.activation)
def activation(x: Tensor, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None) -> Tensor:
    return gated_activation(x, None, kind, dropout_p, rng_state)


@served_by(reference.activation_backward)
def activation_backward(grad: Tensor, x: Tensor, kind: str, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    return gated_activation_backward(grad, x, None, kind, dropout_p, rng_state, [True, False])[0]
