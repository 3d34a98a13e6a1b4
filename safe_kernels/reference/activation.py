"""Activations between two linear layers, with dropout: SiLU, GELU (by erf and by tanh, arXiv 1606.08415) and ReLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safe_kernels.reference.common import compute_dtype, dropout_of

KINDS = ("silu", "gelu", "gelu_tanh", "relu")
"""The supported activations."""


def check_kind(kind: str) -> None:
    """Raise ValueError for a name that is not in `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")


def value(x: Tensor, kind: str) -> Tensor:
    """Return the activation of x.

    silu is x / (1 + exp(-x)). gelu is x Phi(x), where Phi is the standard normal distribution. gelu_tanh is
    x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3). relu is max(x, 0).
    """
    check_kind(kind)
    if kind == "silu":
        return x * x.sigmoid()
    if kind == "gelu":
        return x * (0.5 * torch.erfc(x * -math.sqrt(0.5)))
    if kind == "gelu_tanh":
        return x * (2 * _u(x)).sigmoid()
    return x.clamp(min=0)


def slope(x: Tensor, kind: str) -> Tensor:
    """Return the derivative of `value`; for relu the derivative at 0 is 0."""
    check_kind(kind)
    if kind == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    if kind == "gelu":
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * torch.erfc(x * -math.sqrt(0.5)) + x * density
    if kind == "gelu_tanh":
        x = x.clamp(-10, 10)  # beyond these values the slope is exactly 0 or 1, and x^2 could overflow
        s, rest = (2 * _u(x)).sigmoid(), (-2 * _u(x)).sigmoid()  # rest = 1 - s, without cancellation
        return s + x * s * rest * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return (~(x <= 0)).to(x.dtype)


def _u(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)


def pull_back(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """Return ``grad * slope(x)``; relu stops an infinite gradient too."""
    return torch.where(x <= 0, 0.0, grad) if kind == "relu" else grad * slope(x, kind)


def activation(x: Tensor, kind: str, dropout_p: float = 0.0, rng_state: Tensor | None = None) -> Tensor:
    """Return ``dropout(act(x))`` of x [..., d], contiguous; `kind` is one of `KINDS`, and `rng_state` int64 [2]."""
    dtype = compute_dtype(x)
    return dropout_of(value(x.to(dtype), kind), dropout_p, rng_state).to(x.dtype).contiguous()


def activation_backward(grad: Tensor, x: Tensor, kind: str, dropout_p: float, rng_state: Tensor | None) -> Tensor:
    """Return the gradient of `activation` for x; dropout's mask is computed again from `rng_state`."""
    dtype = compute_dtype(x)
    grad_act = dropout_of(grad.to(dtype), dropout_p, rng_state)
    return pull_back(grad_act, x.to(dtype), kind).to(x.dtype).contiguous()
