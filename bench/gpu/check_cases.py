"""What is checked on a GPU: every op, dtype and shape that has code of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

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


@dataclass
class Case:
    """A call.

    Attributes:
        name: of the case.
        op: what is called.
        tensors: its arguments, which want gradients.
        options: further arguments.
        trained: which of the tensors do want gradients; None: all.
        strided: whether the elements of a row lie apart in memory.
    """

    name: str
    op: Callable[..., Tensor]
    tensors: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    trained: tuple[int, ...] | None = None
    strided: bool = False

    def place(
        self, device: torch.device, dtype: torch.dtype | None = None
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The call on `device`, in `dtype` or the tensors' own; and the tensors that want gradients."""
        moved = [tensor.to(device, dtype).detach() for tensor in self.tensors]
        if self.strided:
            moved = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in moved]
        trained = range(len(moved)) if self.trained is None else self.trained
        leaves = [moved[index].requires_grad_() for index in trained]
        further = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()
        }
        return partial(self.op, *moved, **further), leaves


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def state() -> Tensor:
    return torch.randint(-(2**62), 2**62, (2,))


def linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, **options: Any) -> Tensor:
    return safe_kernels.lora_linear(x, weight, None, A, B, **options)


def lora(size: Size, dtype: torch.dtype, adapter: torch.dtype, p: float) -> Case:
    rows, d_in, d_out, rank = size
    x, base = normal(rows, d_in, dtype=dtype), normal(rows, d_out, dtype=dtype)
    A = normal(rank, d_in, dtype=adapter, scale=d_in**-0.5)
    B = normal(d_out, rank, dtype=adapter, scale=rank**-0.5)
    name = f"lora {rows}x{d_in}-{rank}-{d_out} {adapter} over {dtype} p{p}".replace("torch.", "")
    return Case(name, safe_kernels.lora, [x, base, A, B], {"scaling": 2.0, **dropped(p)})


def dropped(p: float) -> dict[str, Any]:
    return {"dropout_p": p, "rng_state": state() if p else None}


def fused(over: Case, bias: bool = False) -> Case:
    """The same adapter with its layer in one."""
    x, base, A, B = over.tensors
    weight = normal(base.shape[1], x.shape[1], dtype=x.dtype, scale=x.shape[1] ** -0.5)
    name = over.name.replace("lora", "lora_linear with bias" if bias else "lora_linear")
    if bias:
        return Case(name, safe_kernels.lora_linear, [x, weight, normal(len(base.T), dtype=x.dtype), A, B], over.options)
    return Case(name, linear, [x, weight, A, B], over.options)


def rowwise(rows: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    x, up, row = (normal(*shape, dtype=dtype) for shape in ((rows, width), (rows, width), (width,)))
    name = f"{rows}x{width} {dtype}".replace("torch.", "")
    yield Case(f"rms_norm {name}", safe_kernels.rms_norm, [x, row], {"eps": 1e-6})
    yield Case(f"layer_norm {name}", safe_kernels.layer_norm, [x, row, row.clone()], {"eps": 1e-6})
    yield Case(f"dropout {name}", safe_kernels.dropout, [x], dropped(0.3))
    # Every kind has the same code around its formula.
    for kind in ("silu", "gelu", "gelu_tanh", "relu") if dtype == HALF else ("silu",):
        options = {"kind": kind, **dropped(0.1 if kind == "silu" else 0.0)}
        yield Case(f"gated {kind} {name}", safe_kernels.gated_activation, [x, up], options)
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
    yield from unusual()


def large_cases(dry: bool) -> Iterator[Case]:
    """Ragged tiles, and a size that fills a GPU."""
    sizes: list[Size] = [(300, 133, 70, 17)] if dry else [(1000, 1030, 770, 17), (4096, 2048, 2048, 16)]
    for size in sizes:
        for dtype, adapter, p in ((HALF, HALF, 0.1), (HALF, SINGLE, 0.1), (HALF, HALF, 0.0), (SINGLE, SINGLE, 0.0)):
            over = lora(size, dtype, adapter, p)
            yield from (over, fused(over))
        yield from rowwise(size[0], size[1], HALF)
