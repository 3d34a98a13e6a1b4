"""Problems for `lora_linear`, and the truth about them: the oracle's of `lora`, with the base layer's product in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import DTYPES, Dtypes, Results, Shape, Truth, assert_as_good, keep_mask, problem, rounded
from torch import Tensor

import safe_kernels

NAMES = ("x", "weight", "bias", "A", "B")


@dataclass
class Linear:
    """Inputs of one call, and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    grad: Tensor
    scaling: float
    dropout_p: float
    rng_state: Tensor | None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}

    def require(self, *names: str) -> Linear:
        for name, tensor in self.inputs.items():
            tensor.requires_grad_(name in names)
        return self

    def apply(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        options = {"dropout_p": self.dropout_p, "rng_state": self.rng_state, **options}
        return safe_kernels.lora_linear(x, weight, bias, A, B, self.scaling, **options)

    def call(self, **options) -> Tensor:
        return self.apply(**self.inputs, **options)


def linear(
    shape: Shape,
    dtypes: Dtypes = DTYPES[0],
    *,
    leading: tuple[int, ...] | None = None,
    dropout_p: float = 0.0,
    has_bias: bool = True,
) -> Linear:
    """Random inputs of the sizes that training has."""
    p = problem(shape, dtypes, leading=leading, dropout_p=dropout_p)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape.d_out, shape.d_in, generator=generator, dtype=torch.float64) * max(shape.d_in, 1) ** -0.5
    bias = torch.randn(shape.d_out, generator=generator, dtype=torch.float64).to(dtypes.x) if has_bias else None
    return Linear(p.x, weight.to(dtypes.x), bias, p.A, p.B, p.grad, p.scaling, dropout_p, p.rng_state)


def formula(p: Linear) -> Callable[..., Tensor]:
    """What PEFT computes, by plain PyTorch in the inputs' dtype."""

    def run(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        dropped = x.to(A.dtype)
        if p.dropout_p > 0:
            keep = torch.from_numpy(keep_mask(x[..., 0].numel(), x.shape[-1], p.dropout_p, p.rng_state))
            dropped = dropped * (keep.reshape(x.shape).to(A.dtype) / (1 - rounded(p.dropout_p)))
        base = torch.nn.functional.linear(x, weight, bias)
        return (base + (dropped @ A.t()) @ B.t() * p.scaling).to(x.dtype)

    return run


def results(p: Linear, run: Callable[..., Tensor]) -> Results:
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.inputs.items()}
    out = run(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), p.grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_results(p: Linear, got: Results) -> None:
    """Judges those results that are there."""
    double = {name: tensor.detach().double() for name, tensor in p.inputs.items()}
    exact = results(Linear(**{**vars(p), **double, "grad": p.grad.double()}), formula(p))
    incumbent = results(p, formula(p))
    size = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in exact.items()}
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], Truth(exact, size))
