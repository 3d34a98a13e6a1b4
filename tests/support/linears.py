"""Problems for `lora_linear`, and the truth about them: the oracle's of `lora`, with the base layer's product in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from oracle import DTYPES, Dtypes, Results, Shape, Truth, assert_as_good, keep_mask, problem, rounded
from torch import Tensor

import safe_kernels
from safe_kernels.retention import measure

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

    names: ClassVar = NAMES

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Those that may require grad."""
        return {name: tensor for name in self.names if (tensor := getattr(self, name)) is not None}

    def require(self, *names: str) -> Self:
        for name, tensor in self.inputs.items():
            tensor.requires_grad_(name in names)
        return self

    def apply(self, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, **options) -> Tensor:
        options = {"dropout_p": self.dropout_p, "rng_state": self.rng_state, **options}
        return safe_kernels.lora_linear(x, weight, bias, A, B, self.scaling, **options)

    def call(self, **options) -> Tensor:
        return self.apply(**self.inputs, **options)

    def double(self) -> Self:
        values = vars(self).items()
        tensors = {n: v.detach().double() for n, v in values if isinstance(v, Tensor) and v.is_floating_point()}
        return type(self)(**{**vars(self), **tensors})

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the adapter reads."""
        if self.dropout_p == 0:
            return x.to(dtype)
        keep = torch.from_numpy(keep_mask(x[..., 0].numel(), x.shape[-1], self.dropout_p, self.rng_state))
        return x.to(dtype) * (keep.reshape(x.shape).to(dtype) / (1 - rounded(self.dropout_p)))

    def formula(self) -> Callable[..., Tensor]:
        """What PEFT computes, by plain PyTorch in the inputs' dtype."""

        def run(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
            delta = (self.dropped(x, A.dtype) @ A.t()) @ B.t() * self.scaling
            return (F.linear(x, weight, bias) + delta).to(x.dtype)

        return run


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


def results(p: Linear, run: Callable[..., Tensor]) -> Results:
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.inputs.items()}
    out = run(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), p.grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_results(p: Linear, got: Results) -> None:
    """Judges those results that are there."""
    double = p.double()
    exact, incumbent = results(double, double.formula()), results(p, p.formula())
    size = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in exact.items()}
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], Truth(exact, size))


def retained_by(
    p: Any, names: tuple[str, ...], judge: Callable[[Any, Results], None], exclude: Iterable[Tensor]
) -> int:
    """The bytes that a call retains if these inputs require grad. They alone get a gradient, and it is judged."""
    p.require(*names)
    retained = measure(p.call, exclude=exclude)
    out = retained.output
    assert (out.grad_fn is not None) == bool(names)
    if names:
        out.backward(p.grad)
    grads = {name: tensor.grad for name, tensor in p.inputs.items() if tensor.grad is not None}
    assert set(grads) == set(names)
    judge(p, {"out": out.detach(), **grads})
    return retained.bytes
