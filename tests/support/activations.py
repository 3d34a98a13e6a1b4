"""The truth that activations are judged by: PyTorch's own functions in float64, and extended precision for float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mpmath
import torch
import torch.nn.functional as F
from oracle import Truth, assert_as_good, keep_mask, rounded
from torch import Tensor

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 2.0) -> Tensor:
    """Pre-activations that reach both tails."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def expanded(t: Tensor) -> Tensor:
    return t[:1].expand(t.shape)


def factor_of(like: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor | None:
    """What dropout multiplies by, in float64, from a Philox of the tests' own."""
    if dropout_p == 0:
        return None
    keep = torch.from_numpy(keep_mask(math.prod(like.shape[:-1]), like.shape[-1], dropout_p, rng_state)).reshape(
        like.shape
    )
    return keep.double() * (0.0 if dropout_p == 1 else 1 / (1 - rounded(dropout_p)))


def by_pytorch(kind: str, inputs: Sequence[Tensor], grad: Tensor, factor: Tensor | None) -> list[Tensor]:
    """The output and the inputs' gradients, by plain PyTorch in the inputs' dtype."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = KINDS[kind](leaves[0])
    for up in leaves[1:]:
        out = out * up
    if factor is not None:
        out = out * factor.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def in_30_digits(kind: str, x: float) -> tuple[float, float]:
    """Value and slope at x."""
    with mpmath.workdps(30):
        x = mpmath.mpf(x)
        if kind == "relu":
            return float(max(x, 0)), float(x > 0)
        if kind == "gelu":
            cdf = mpmath.erfc(-x / mpmath.sqrt(2)) / 2
            return float(x * cdf), float(cdf + x * mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi))
        c = 2 * mpmath.sqrt(2 / mpmath.pi)
        u, du = (x, 1) if kind == "silu" else (c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x * x))
        s = 1 / (1 + mpmath.exp(-u))
        return float(x * s), float(s + x * s * (1 - s) * du)


def exactly(kind: str, inputs: Sequence[Tensor], grad: Tensor, factor: Tensor | None) -> list[Tensor]:
    """The output and the inputs' gradients, exact to more digits than the inputs' dtype has."""
    x, *ups = (tensor.detach().double() for tensor in inputs)
    if inputs[0].dtype != torch.float64:
        return by_pytorch(kind, (x, *ups), grad.double(), factor)
    pairs = torch.tensor([in_30_digits(kind, value) for value in x.flatten().tolist()], dtype=torch.float64)
    value, slope = pairs.reshape(-1, 2).t().reshape(2, *x.shape)
    factor = torch.ones_like(x) if factor is None else factor
    up = ups[0] if ups else torch.ones_like(x)
    results = [value * up * factor, grad * factor * up * slope, grad * factor * value]
    return results[: 1 + len(inputs)]


def assert_results(
    got: Sequence[Tensor | None],
    kind: str,
    inputs: Sequence[Tensor],
    grad: Tensor,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> None:
    """Judges the output and the gradients; None stands for one that is not there."""
    factor = factor_of(inputs[0], dropout_p, rng_state)
    incumbent, truth = by_pytorch(kind, inputs, grad, factor), exactly(kind, inputs, grad, factor)
    for name, result, other, exact in zip(("out", "grad", "grad_up"), got, incumbent, truth, strict=False):
        if result is not None:
            size = exact.abs().max().item() if exact.numel() else 0.0
            assert_as_good(f"{kind} {name}", result, other, Truth({f"{kind} {name}": exact}, {f"{kind} {name}": size}))
