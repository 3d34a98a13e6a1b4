"""Problems for `lora_conv`, and the truth about them: PEFT's formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from linears import Linear
from oracle import DTYPES, Dtypes, keep_mask, rng_state, rounded
from torch import Tensor

import safe_kernels

NAMES = ("x", "bias", "A", "B")
D_IN, D_OUT, RANK = 6, 8, 4


@dataclass(frozen=True)
class Window:
    """A convolution: its kernel, its steps and the positions of its input."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __str__(self) -> str:
        return "-".join("x".join(map(str, part)) for part in (self.size, self.kernel, *self.steps)) + f"-{self.groups}"

    @property
    def steps(self) -> tuple[tuple[int, ...], ...]:
        ones = (1,) * len(self.size)
        return self.stride or ones, self.padding or (0,) * len(self.size), self.dilation or ones


SQUARE = Window((5, 6), (3, 3), padding=(1, 1))
WINDOWS = (
    SQUARE,
    Window((5, 6), (1, 1)),
    Window((7, 6), (3, 2), stride=(2, 3), padding=(1, 0)),
    Window((8, 9), (3, 3), padding=(2, 2), dilation=(2, 2)),
    Window((5, 6), (3, 3), stride=(2, 2), padding=(1, 1), groups=2),
    Window((11,), (3,), stride=(2,), padding=(1,)),
    Window((3, 4, 5), (2, 3, 3), padding=(0, 1, 1)),
)


@dataclass
class Conv(Linear):
    """Inputs of one call, and the gradient that comes back to it; the weight is no leaf."""

    window: Window

    names: ClassVar = NAMES

    def apply(self, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        options = {"dropout_p": self.dropout_p, "rng_state": self.rng_state}
        steps = (*self.window.steps, self.window.groups)
        return safe_kernels.lora_conv(x, self.weight, bias, A, B, self.scaling, *steps, **options)

    def dropped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.dropout_p == 0:
            return x.to(dtype)
        columns = math.prod(self.window.size)
        keep = torch.from_numpy(keep_mask(x.numel() // columns, columns, self.dropout_p, self.rng_state))
        return x.to(dtype) * (keep.reshape(x.shape).to(dtype) / (1 - rounded(self.dropout_p)))

    def formula(self) -> Callable[..., Tensor]:
        """What PEFT computes, by plain PyTorch in the inputs' dtypes."""
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.window.size) - 1]
        steps, groups = self.window.steps, self.window.groups

        def run(x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
            delta = conv(conv(self.dropped(x, A.dtype), A, None, *steps), B, groups=groups) * self.scaling
            return (conv(x, self.weight, bias, *steps, groups) + delta).to(x.dtype)

        return run


def conv(
    window: Window = SQUARE,
    dtypes: Dtypes = DTYPES[0],
    *,
    batch: tuple[int, ...] = (3,),
    dropout_p: float = 0.0,
    has_bias: bool = True,
) -> Conv:
    """Random inputs of the sizes that training has: activations about 1, an adapter that adds about 1."""
    generator = torch.Generator().manual_seed(4)
    taps = math.prod(window.kernel)

    def normal(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    p = Conv(
        x=normal(*batch, D_IN, *window.size, dtype=dtypes.x),
        weight=normal(D_OUT, D_IN // window.groups, *window.kernel, dtype=dtypes.x, scale=(D_IN * taps) ** -0.5),
        bias=normal(D_OUT, dtype=dtypes.x) if has_bias else None,
        A=normal(RANK, D_IN, *window.kernel, dtype=dtypes.adapter, scale=(D_IN * taps) ** -0.5),
        B=normal(D_OUT, RANK // window.groups, *[1] * len(window.size), dtype=dtypes.adapter, scale=RANK**-0.5),
        grad=torch.empty(0),
        scaling=2.0,
        dropout_p=dropout_p,
        rng_state=rng_state(0) if dropout_p > 0 else None,
        window=window,
    )
    with torch.no_grad():
        p.grad = normal(*p.formula()(**p.inputs).shape, dtype=dtypes.x)
    return p
