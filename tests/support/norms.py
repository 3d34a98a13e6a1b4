"""Problems for `rms_norm` and `layer_norm`, and the truth about them in float64, written without the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from oracle import DTYPES, Dtypes, Results, Truth, assert_as_good
from torch import Tensor

import safe_kernels

SHAPES = ((0, 5), (1, 1), (2, 7), (37, 33), (130, 100), (5, 384), (3, 1031))
KINDS = ("rms", "rms-offset", "layer", "layer-no-bias", "layer-no-weight", "layer-bare")
MIDDLE = (37, 33)
NAMES = ("out", "x", "weight", "bias")


@dataclass
class Norm:
    """Inputs of one call, and the gradient that comes back to it."""

    kind: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    grad: Tensor
    eps: float = 1e-5

    @property
    def offset(self) -> float:
        return 1.0 if self.kind == "rms-offset" else 0.0

    @property
    def inputs(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def require(self, *names: str) -> Norm:
        for name, tensor in self.inputs.items():
            tensor.requires_grad_(name in names)
        return self

    def call(self, retain_output: bool = True) -> Tensor:
        return self.apply(retain_output=retain_output, **self.inputs)

    def apply(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, **options: bool) -> Tensor:
        if self.kind.startswith("rms"):
            return safe_kernels.rms_norm(x, weight, self.eps, weight_offset=self.offset, **options)
        return safe_kernels.layer_norm(x, weight, bias, self.eps, **options)


def norm(
    kind: str,
    shape: Sequence[int] = MIDDLE,
    dtypes: Dtypes = DTYPES[0],
    *,
    ratio: float = 1.0,
    aligned: float = 0.0,
    seed: int = 0,
) -> Norm:
    """Random inputs: weights of either sign, 0.5 to 1.5; |bias| up to `ratio` times as large.

    With `aligned`, that many parts of the gradient are parallel to the normalised row, to one that is not.
    """
    generator = torch.Generator().manual_seed(seed)
    d = shape[-1]
    x, grad = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    sign, size, share = (torch.rand(d, generator=generator, dtype=torch.float64) for _ in range(3))
    scale = (0.5 + size) * torch.where(sign < 0.5, -1.0, 1.0)
    bias = ratio * scale * (share if ratio <= 1 else torch.where(share < 0.5, -1.0, 1.0))
    if aligned:
        grad = (grad + aligned * F.layer_norm(x, (d,))) / scale
    weight = None if kind in ("layer-no-weight", "layer-bare") else scale - (1.0 if kind == "rms-offset" else 0.0)
    has_bias = kind in ("layer", "layer-no-weight")
    return Norm(
        kind,
        x=(x + 0.5).to(dtypes.x),
        weight=None if weight is None else weight.to(dtypes.adapter),
        bias=bias.to(dtypes.adapter) if has_bias else None,
        grad=grad.to(dtypes.x),
    )


# ---------------------------------------------------------------- the truth


def truth(p: Norm) -> Truth:
    """By the formulas in float64; in extended precision for a float64 problem."""
    real = np.longdouble if p.x.dtype == torch.float64 else np.float64
    d = p.x.shape[-1]

    def exact(tensor: Tensor | None, otherwise: float) -> np.ndarray:
        if tensor is None:
            return np.full(d, otherwise, dtype=real)
        return tensor.detach().double().numpy().astype(real)

    x, grad = (exact(tensor, 0.0).reshape(-1, d) for tensor in (p.x, p.grad))
    weight, bias = exact(p.weight, 1.0) + real(p.offset), exact(p.bias, 0.0)
    centred = 0.0 if p.kind.startswith("rms") else 1.0
    mean = centred * x.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + real(p.eps))
    x_hat, g = (x - mean) * rstd, grad * weight
    level, along = centred * g.mean(-1, keepdims=True), (g * x_hat).mean(-1, keepdims=True)
    values = (x_hat * weight + bias, rstd * (g - level - x_hat * along), (grad * x_hat).sum(0), grad.sum(0))
    # Of terms with random signs, the squares add up; x and its mean are such terms, too.
    x_hat_squared = (x**2 + mean**2) * rstd**2
    squares = (
        x_hat_squared * weight**2 + bias**2,
        rstd**2 * (g**2 + level**2 + x_hat_squared * along**2),
        (grad**2 * x_hat_squared).sum(0),
        (grad**2).sum(0),
    )
    like = (p.x, p.x, p.weight, p.bias)
    results = {
        name: torch.from_numpy(np.asarray(value).astype(np.float64)).reshape(tensor.shape)
        for name, value, tensor in zip(NAMES, values, like, strict=True)
        if tensor is not None
    }
    return Truth(results, {name: float(np.sqrt(s.max(initial=0))) for name, s in zip(NAMES, squares, strict=True)})


def plain(p: Norm) -> Results:
    """What a stock model computes in the working dtype: F.layer_norm, or RMSNorm as transformers writes it."""

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        hidden = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + p.eps)
        if p.offset:  # Gemma
            return (hidden * (p.offset + weight.to(hidden.dtype))).to(x.dtype)
        return (weight * hidden.to(x.dtype)).to(x.dtype)  # Llama

    def layer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        wide = next((t.dtype for t in (weight, bias) if t is not None), x.dtype)
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, p.eps).to(x.dtype)

    return results(p, rms if p.kind.startswith("rms") else layer)


def results(p: Norm, run: Callable[..., Tensor]) -> Results:
    """The output and the gradients of all inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in p.inputs.items()}
    out = run(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), p.grad)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_results(p: Norm, got: Results) -> None:
    """Judges those results that are there."""
    incumbent, exact = plain(p), truth(p)
    for name, tensor in got.items():
        assert_as_good(name, tensor, incumbent[name], exact)


def backward_op(p: Norm, from_output: bool, mask: list[bool]) -> Results:
    """The backward op by itself, for what autograd never asks of it."""
    if p.kind.startswith("rms"):
        out, rstd = torch.ops.safe_kernels.rms_norm(p.x, p.weight, p.eps, p.offset)
        retained = out if from_output else p.x
        arguments = (p.grad, retained, p.weight, rstd, p.offset, from_output, mask[:2])
        grads = torch.ops.safe_kernels.rms_norm_backward(*arguments)
    else:
        out, mean, rstd = torch.ops.safe_kernels.layer_norm(p.x, p.weight, p.bias, p.eps)
        retained, mean = (out, None) if from_output else (p.x, mean)
        arguments = (p.grad, retained, p.weight, p.bias, mean, rstd, from_output, mask)
        grads = torch.ops.safe_kernels.layer_norm_backward(*arguments)
    return dict(zip(NAMES[1:], grads, strict=False))
