"""Problems for `dora`, and the truth about them: PEFT's formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from linears import linear
from oracle import DTYPES, Dtypes, Results, Shape, Truth, assert_as_good, keep_mask, rounded
from torch import Tensor

import safe_kernels

NAMES = ("x", "bias", "A", "B", "magnitude")


@dataclass
class Dora:
    """Inputs of one call, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    magnitude: Tensor
    grad: Tensor
    scaling: float
    dropout_p: float
    rng_state: Tensor | None

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Those that may require grad."""
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    def require(self, *names: str) -> Dora:
        for name, tensor in self.inputs.items():
            tensor.requires_grad_(name in names)
        return self

    def apply(self, x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor | None = None) -> Tensor:
        options = {"dropout_p": self.dropout_p, "rng_state": self.rng_state}
        return safe_kernels.dora(x, self.weight, bias, A, B, magnitude, self.scaling, **options)

    def call(self) -> Tensor:
        return self.apply(**self.inputs)

    def double(self) -> Dora:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {n: v.detach().double() for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return Dora(**{**values, **tensors})


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
    magnitude = (p.weight.double().norm(dim=1) * moved).to(dtypes.adapter)
    return Dora(p.x, p.weight, p.bias, p.A, p.B, magnitude, p.grad, p.scaling, dropout_p, p.rng_state)


def formula(p: Dora) -> Callable[..., Tensor]:
    """What PEFT's DoraLinearVariant computes, by plain PyTorch in the inputs' dtypes."""

    def run(x: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, bias: Tensor | None = None) -> Tensor:
        result = F.linear(x, p.weight, bias)
        dropped, weight = x.to(A.dtype), p.weight.to(A.dtype)
        if p.dropout_p > 0:
            keep = torch.from_numpy(keep_mask(x[..., 0].numel(), x.shape[-1], p.dropout_p, p.rng_state))
            dropped = dropped * (keep.reshape(x.shape).to(A.dtype) / (1 - rounded(p.dropout_p)))
            base = F.linear(dropped, weight)
        else:
            base = result if bias is None else result - bias
        norm = torch.linalg.norm(weight + p.scaling * (B @ A).detach(), dim=1)
        scale = magnitude / norm
        return (result + ((scale - 1) * base + scale * F.linear(F.linear(dropped, A), B) * p.scaling)).to(x.dtype)

    return run


def results(p: Dora, run: Callable[..., Tensor]) -> Results:
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.inputs.items()}
    out = run(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), p.grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_results(p: Dora, got: Results) -> None:
    """Judges those results that are there."""
    double = p.double()
    exact, incumbent = results(double, formula(double)), results(p, formula(p))
    size = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in exact.items()}
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], Truth(exact, size))
