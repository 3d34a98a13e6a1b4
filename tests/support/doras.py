"""Problems for `dora`, and the truth about them: PEFT's formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from linears import Linear, linear
from oracle import DTYPES, Dtypes, Shape
from torch import Tensor

import safe_kernels

NAMES = ("x", "bias", "A", "B", "magnitude")


@dataclass
class Dora(Linear):
    """Inputs of one call, and the gradient that comes back to it; the weight is no leaf."""

    magnitude: Tensor

    names: ClassVar = NAMES

    def apply(self, x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor | None = None) -> Tensor:
        options = {"dropout_p": self.dropout_p, "rng_state": self.rng_state}
        return safe_kernels.dora(x, self.weight, bias, A, B, magnitude, self.scaling, **options)

    def formula(self) -> Callable[..., Tensor]:
        """What PEFT's DoraLinearVariant computes, by plain PyTorch in the inputs' dtypes."""

        def run(x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor | None = None) -> Tensor:
            result = F.linear(x, self.weight, bias)
            dropped, weight = self.dropped(x, A.dtype), self.weight.to(A.dtype)
            plain = result if bias is None else result - bias
            base = F.linear(dropped, weight) if self.dropout_p > 0 else plain
            norm = torch.linalg.norm(weight + self.scaling * (B @ A).detach(), dim=1)
            scale = magnitude / norm
            added = (scale - 1) * base + scale * F.linear(F.linear(dropped, A), B) * self.scaling
            return (result + added).to(x.dtype)

        return run


def dora(
    shape: Shape,
    dtypes: Dtypes = DTYPES[0],
    *,
    leading: tuple[int, ...] | None = None,
    dropout_p: float = 0.0,
    has_bias: bool = True,
) -> Dora:
    """Random inputs of the sizes that training has; the magnitude has moved by some percent from the norm."""
    p = linear(shape, dtypes, leading=leading, dropout_p=dropout_p, has_bias=has_bias)
    generator = torch.Generator().manual_seed(6)
    moved = 1 + 0.1 * torch.randn(shape.d_out, generator=generator, dtype=torch.float64)
    return Dora(**vars(p), magnitude=(p.weight.double().norm(dim=1) * moved).to(dtypes.adapter))
