"""The calls that are checked on a GPU: every op, dtype and shape that has code of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import safe_kernels

HALF, SINGLE = torch.bfloat16, torch.float32
DTYPES = (HALF, torch.float16, SINGLE)
ADAPTERS = ((HALF, HALF), (HALF, SINGLE), (torch.float16, torch.float16), (SINGLE, SINGLE))
"""Dtypes of the layer and of its adapter."""
Size = tuple[int, int, int, int]
SMALL: Size = (130, 96, 80, 5)
"""Rows, features in, features out, rank."""
LARGE: tuple[Size, ...] = ((1000, 1030, 770, 17), (4096, 2048, 2048, 16))
"""Ragged tiles, and a size that fills a GPU."""


class Normal(NamedTuple):
    """A tensor of random numbers, which does not exist before a call draws it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float = 1.0

    def draw(self) -> Tensor:
        return (torch.randn(*self.shape, dtype=torch.float64) * self.scale).to(self.dtype)


@dataclass
class Case:
    """A call.

    Attributes:
        name: of the case.
        op: what is called.
        inputs: its arguments, which want gradients.
        options: further arguments.
        trained: which of the inputs do want gradients; None: all.
        strided: whether the elements of a row lie apart in memory.
    """

    name: str
    op: Callable[..., Tensor]
    inputs: list[Normal]
    options: dict[str, Any] = field(default_factory=dict)
    trained: tuple[int, ...] | None = None
    strided: bool = False

    def __str__(self) -> str:
        return self.name

    def place(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The call on `device`, in `dtype` or the inputs' own; and the tensors that want gradients."""
        torch.manual_seed(0)
        moved = [normal.draw().to(device, dtype) for normal in self.inputs]
        if self.strided:
            moved = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in moved]
        trained = range(len(moved)) if self.trained is None else self.trained
        leaves = [moved[index].requires_grad_() for index in trained]
        rng_state = {"rng_state": state().to(device)} if self.options.get("dropout_p") else {}
        return partial(self.op, *moved, **self.options, **rng_state), leaves


def state() -> Tensor:
    return torch.randint(-(2**62), 2**62, (2,))


def linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
    return safe_kernels.lora_linear(x, weight, None, A, B, **options)


def lora(size: Size, dtype: torch.dtype, adapter: torch.dtype, p: float) -> Case:
    rows, d_in, d_out, rank = size
    x, base = Normal((rows, d_in), dtype), Normal((rows, d_out), dtype)
    A, B = Normal((rank, d_in), adapter, d_in**-0.5), Normal((d_out, rank), adapter, rank**-0.5)
    name = f"lora {rows}x{d_in}-{rank}-{d_out} {adapter} over {dtype} p{p}".replace("torch.", "")
    return Case(name, safe_kernels.lora, [x, base, A, B], {"scaling": 2.0, "dropout_p": p})


def fused(over: Case, bias: bool = False) -> Case:
    """The same adapter with its layer in one."""
    x, base, A, B = over.inputs
    (_, d_in), (_, d_out) = x.shape, base.shape
    weight = Normal((d_out, d_in), x.dtype, d_in**-0.5)
    if bias:
        name = over.name.replace("lora", "lora_linear with bias")
        return Case(name, safe_kernels.lora_linear, [x, weight, Normal((d_out,), x.dtype), A, B], over.options)
    return Case(over.name.replace("lora", "lora_linear"), linear, [x, weight, A, B], over.options)


def head_and_loss(x: Tensor, weight: Tensor) -> Tensor:
    target = torch.arange(len(x), device=x.device) % len(weight)
    target[::3] = -100
    return safe_kernels.linear_cross_entropy(x, weight, None, target, softcap=4.0)


def last_layer(size: Size, dtype: torch.dtype) -> Case:
    rows, d, classes, _ = size
    inputs = [Normal((rows, d), dtype), Normal((classes, d), dtype, d**-0.5)]
    name = f"linear_cross_entropy {rows}x{d}-{classes} {dtype}".replace("torch.", "")
    return Case(name, head_and_loss, inputs, trained=(0,))


def rowwise(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    x, row = Normal((rows, width), dtype), Normal((width,), dtype)
    name = f"{rows}x{width} {dtype}".replace("torch.", "")
    yield Case(f"rms_norm {name}", safe_kernels.rms_norm, [x, row], {"eps": 1e-6})
    yield Case(f"layer_norm {name}", safe_kernels.layer_norm, [x, row, row], {"eps": 1e-6})
    yield Case(f"dropout {name}", safe_kernels.dropout, [x], {"dropout_p": 0.3})
    heads, angles = Normal((2, 3, rows, width), dtype), Normal((1, rows, width // 2 * 2), dtype)
    yield Case(f"rotary {name}", safe_kernels.rotary, [heads, angles, angles], trained=(0,))
    # Every kind has the same code around its formula.
    for kind in ("silu", "gelu", "gelu_tanh", "relu") if dtype == HALF else ("silu",):
        options = {"kind": kind, "dropout_p": 0.1 if kind == "silu" else 0.0}
        yield Case(f"gated {kind} {name}", safe_kernels.gated_activation, [x, x], options)
        yield Case(f"activation {kind} {name}", safe_kernels.activation, [x], options)


def unusual() -> Iterator[Case]:
    """Strides, tensors without a gradient, no rows, a bias."""
    rows, d_in, *_ = SMALL
    over = lora(SMALL, HALF, HALF, 0.1)
    for case in (over, fused(over), *rowwise(rows, d_in, HALF)):
        yield replace(case, name=f"strided {case.name}", strided=True)
    for trained in ((0,), (1,), (2,), (3,), (2, 3), (0, 2), (0, 1, 2)):
        for case in (over, fused(over)):
            yield replace(case, name=f"{case.name}, gradients of {trained}", trained=trained)
    empty = lora((0, *SMALL[1:]), HALF, HALF, 0.1)
    yield from (empty, fused(empty), *rowwise(0, d_in, HALF))
    yield fused(over, bias=True)


def small_cases() -> Iterator[Case]:
    rows, d_in, *_ = SMALL
    for (dtype, adapter), p in product(ADAPTERS, (0.1, 0.0)):
        over = lora(SMALL, dtype, adapter, p)
        yield from (over, fused(over))
    for dtype in DTYPES:
        yield from rowwise(rows, d_in, dtype)
        yield last_layer(SMALL, dtype)
    yield last_layer((700, 64, 140_000, 0), HALF)  # more than one chunk
    yield from unusual()


def large_cases() -> Iterator[Case]:
    for size in LARGE:
        for dtype, adapter, p in ((HALF, HALF, 0.1), (HALF, SINGLE, 0.1), (HALF, HALF, 0.0), (SINGLE, SINGLE, 0.0)):
            over = lora(size, dtype, adapter, p)
            yield from (over, fused(over))
        yield from rowwise(size[0], size[1], HALF)


def without_weight() -> Iterator[Case]:
    """One adapter, by itself and with its layer, whose weight is left out: cuBLAS may sum its gradient otherwise."""
    over = lora(SMALL, HALF, HALF, 0.1)
    yield from (over, replace(fused(over), trained=(0, 2, 3)))
