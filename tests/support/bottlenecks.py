"""Problems for `bottleneck`, and the truth about them: the formula by plain PyTorch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from oracle import DTYPES, Dtypes, Results, Shape, Truth, assert_as_good, keep_mask, problem, rounded
from torch import Tensor

import safe_kernels

NAMES = ("x", "residual", "W_down", "b_down", "W_up", "b_up")
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@dataclass
class Bottleneck:
    """Inputs of one call, and the gradient that comes back to it."""

    x: Tensor
    residual: Tensor
    W_down: Tensor
    b_down: Tensor
    W_up: Tensor
    b_up: Tensor
    grad: Tensor
    kind: str
    scaling: float
    dropout_p: float
    rng_state: Tensor | None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in NAMES}

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.W_down, self.b_down, self.W_up, self.b_up

    def require(self, *names: str) -> Bottleneck:
        for name, tensor in self.inputs.items():
            tensor.requires_grad_(name in names)
        return self

    def apply(self, *tensors: Tensor, **options) -> Tensor:
        options = {"dropout_p": self.dropout_p, "rng_state": self.rng_state, **options}
        return safe_kernels.bottleneck(*tensors, self.kind, self.scaling, **options)

    def call(self, **options) -> Tensor:
        return self.apply(*self.inputs.values(), **options)

    def double(self) -> Bottleneck:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {n: v.detach().double() for n, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return Bottleneck(**{**values, **tensors})


def bottleneck(
    shape: Shape,
    dtypes: Dtypes = DTYPES[0],
    *,
    kind: str = "relu",
    leading: tuple[int, ...] | None = None,
    dropout_p: float = 0.0,
) -> Bottleneck:
    """Random inputs of the sizes that training has."""
    p = problem(shape, dtypes, leading=leading, dropout_p=dropout_p)
    generator = torch.Generator().manual_seed(7)
    biases = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape.rank, shape.d_out)]
    b_down, b_up = (0.3 * bias.to(dtypes.adapter) for bias in biases)
    return Bottleneck(p.x, p.base, p.A, b_down, p.B, b_up, p.grad, kind, 0.7, dropout_p, p.rng_state)


def formula(p: Bottleneck) -> Callable[..., Tensor]:
    """What the tuner computes, by plain PyTorch in the inputs' dtypes, with the op's dropout mask."""

    def run(x: Tensor, residual: Tensor, W_down: Tensor, b_down: Tensor, W_up: Tensor, b_up: Tensor) -> Tensor:
        h = PLAIN[p.kind](F.linear(x.to(W_down.dtype), W_down, b_down))
        if p.dropout_p > 0:
            keep = torch.from_numpy(keep_mask(x[..., 0].numel(), h.shape[-1], p.dropout_p, p.rng_state))
            h = h * (keep.reshape(h.shape).to(h.dtype) / (1 - rounded(p.dropout_p)))
        return (residual + p.scaling * F.linear(h, W_up, b_up)).to(residual.dtype)

    return run


def results(p: Bottleneck, run: Callable[..., Tensor]) -> Results:
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.inputs.items()}
    out = run(*leaves.values())
    grads = torch.autograd.grad(out, list(leaves.values()), p.grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_results(p: Bottleneck, got: Results) -> None:
    """Judges those results that are there."""
    double = p.double()
    exact, incumbent = results(double, formula(double)), results(p, formula(p))
    size = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in exact.items()}
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], Truth(exact, size))
