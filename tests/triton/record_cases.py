"""Calls of every op whose records are checked: each makes new tensors of one kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

N, D_IN, D_OUT = 40, 64, 96
Arguments = list[Any]
BF16, F32 = torch.bfloat16, torch.float32


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def random_state() -> Tensor:
    return torch.randint(2**40, (2,))


def lora(dtype: torch.dtype = BF16, adapter: torch.dtype = BF16, r: int = 8, p: float = 0.1) -> Arguments:
    x, base = normal(2, N // 2, D_IN, dtype=dtype), normal(2, N // 2, D_OUT, dtype=dtype)
    return [x, base, normal(r, D_IN, dtype=adapter), normal(D_OUT, r, dtype=adapter), 2.0, p, random_state()]


def no_rows(arguments: Arguments) -> Arguments:
    """The first dimensions of [2, N / 2, ...] tensors become [2, 0, ...]."""
    return [value[:, :0] if isinstance(value, Tensor) and value.dim() == 3 else value for value in arguments]


def scored(weighted: bool) -> Arguments:
    blocks = torch.tensor([0, 16]), 16, torch.ones(N, dtype=torch.int64) if weighted else None
    return [*lora(p=0.0)[:-1], None, *blocks]


def lora_backward(r: int, *mask: bool) -> Arguments:
    x, base, A, B, *rest = lora(r=r)
    return [base, x if mask[1] or mask[2] else None, A, B, *rest, list(mask)]


def linear(bias: bool) -> Arguments:
    x, _, A, B, *rest = lora()
    return [x, normal(D_OUT, D_IN), normal(D_OUT) if bias else None, A, B, *rest]


def linear_backward(*mask: bool) -> Arguments:
    x, base, A, B, *rest = lora()
    return [base, x, normal(D_OUT, D_IN), A, B, *rest, list(mask)]


def halves() -> Arguments:
    both = normal(N, 2 * D_IN)
    return [both[:, :D_IN], both[:, D_IN:], "silu", 0.0, None]


def twice() -> Arguments:
    x = normal(N, D_IN)
    return [x, x, "silu", 0.1, random_state()]


def unaligned() -> Arguments:
    return [torch.randn(N * D_IN + 1).to(BF16)[1:].view(N, D_IN), 0.1, random_state()]


def transposed() -> Arguments:
    return [normal(D_IN, N).t(), 0.1, random_state()]


def heads() -> Arguments:
    return [normal(2, 5, 4, 16), normal(1, 5, 16), normal(1, 5, 16)]


Case = tuple[str, Callable[[], Arguments]]
CASES: dict[str, Case] = {
    "lora": ("lora", lora),
    "lora without dropout": ("lora", lambda: lora(p=0.0)[:-1]),
    "lora, rank in several tiles": ("lora", lambda: lora(r=144, p=0.0)[:-1]),
    "lora, float32 adapter": ("lora", lambda: lora(adapter=F32)),
    "lora, scored": ("lora", lambda: scored(False)),
    "lora, scored with weights": ("lora", lambda: scored(True)),
    "lora, no rows": ("lora", lambda: no_rows(lora())),
    "lora_backward, no rows": ("lora_backward", lambda: no_rows(lora_backward(8, True, True, True))),
    "lora_linear, no rows": ("lora_linear", lambda: no_rows(linear(True))),
    "lora_linear_backward, no rows": (
        "lora_linear_backward",
        lambda: no_rows(linear_backward(True, False, False, True, True)),
    ),
    "lora_backward": ("lora_backward", lambda: lora_backward(8, True, True, True)),
    "lora_backward of x": ("lora_backward", lambda: lora_backward(8, True, False, False)),
    "lora_backward of A": ("lora_backward", lambda: lora_backward(8, False, True, False)),
    "lora_backward of B": ("lora_backward", lambda: lora_backward(8, False, False, True)),
    "lora_backward, wide": ("lora_backward", lambda: lora_backward(40, True, True, True)),
    "lora_linear": ("lora_linear", lambda: linear(False)),
    "lora_linear with bias": ("lora_linear", lambda: linear(True)),
    "lora_linear_backward": ("lora_linear_backward", lambda: linear_backward(True, False, False, True, True)),
    "rms_norm": ("rms_norm", lambda: [normal(N, D_IN), normal(D_IN), 1e-6, 0.0, True]),
    "rms_norm_backward": (
        "rms_norm_backward",
        lambda: [normal(N, D_IN), normal(N, D_IN), normal(D_IN), torch.rand(N), 0.0, True, [True, False]],
    ),
    "layer_norm": ("layer_norm", lambda: [normal(N, D_IN), normal(D_IN), None, 1e-6, True]),
    "activation": ("activation", lambda: [normal(N, D_IN), "gelu", 0.1, random_state()]),
    "activation_backward": ("activation_backward", lambda: [normal(N, D_IN), normal(N, D_IN), "relu", 0.0, None]),
    "gated_activation of halves": ("gated_activation", halves),
    "gated_activation of one": ("gated_activation", twice),
    "gated_activation_backward": (
        "gated_activation_backward",
        lambda: [normal(N, D_IN), *halves()[:3], 0.1, random_state(), [True, True]],
    ),
    "rotary": ("rotary", lambda: [*heads(), False]),
    "rotary of heads before tokens, transposed": (
        "rotary",
        lambda: [normal(2, 4, 5, 16).transpose(1, 2), *heads()[1:], True],
    ),
    "dropout": ("dropout", lambda: [normal(N, D_IN), 0.1, random_state()]),
    "dropout, unaligned": ("dropout", unaligned),
    "dropout, transposed": ("dropout", transposed),
}
