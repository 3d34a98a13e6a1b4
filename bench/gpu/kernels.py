"""The ops by themselves, bf16, beside PEFT's operations, torch.compile of those, Liger, and cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from machine import arguments, ceilings, describe, device_of, median_ms, write
from torch import Tensor
from torch.nn import functional as F

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks

SCALING = 2.0
OWN = ("safe", "fused")
Providers = dict[str, Callable[[], Any]]
Case = tuple[str, Providers, dict[str, float]]
"""A name, what is timed, and the least it has to move or to compute."""


def peft(x: Tensor, base: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    """As PEFT writes it."""
    return base + F.linear(F.linear(F.dropout(x, p), A), B) * SCALING


def peft_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return peft(x, F.linear(x, weight), A, B, p)


def safe(x: Tensor, base: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return safe_kernels.lora(x, base, A, B, SCALING, dropout_p=p)


def safe_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return safe(x, F.linear(x, weight), A, B, p)


def fused_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return safe_kernels.lora_linear(x, weight, None, A, B, SCALING, dropout_p=p)


class Shapes:
    """Random tensors of one size; everything that trains wants a gradient."""

    def __init__(self, rows: int, width: int, rank: int, device: torch.device, trains: bool = True) -> None:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).bfloat16()

        self.rows, self.width, self.rank = rows, width, rank
        self.x, self.base = normal(rows, width).requires_grad_(), normal(rows, width).requires_grad_()
        self.weight, self.grad = normal(width, width, scale=width**-0.5), normal(rows, width)
        self.A, self.B = normal(rank, width, scale=width**-0.5), normal(width, rank, scale=rank**-0.5)
        self.A.requires_grad_(trains)
        self.B.requires_grad_(trains)

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in (self.x, self.base, self.A, self.B) if tensor.requires_grad]

    def step(self, forward: Callable[[], Tensor]) -> None:
        forward().backward(self.grad)

    def cublas(self) -> None:
        """The base layer's products alone: the floor of a layer, forward and backward."""
        F.linear(self.x.detach(), self.weight)
        self.grad @ self.weight


def lora_cases(s: Shapes, p: float, compiled: bool) -> Iterator[Case]:
    """The op over a base layer that is already computed; and the smallest number of bytes it has to move."""
    arguments = (s.x, s.base, s.A, s.B, p)
    forwards: Providers = {"peft": partial(peft, *arguments), "safe": partial(safe, *arguments)}
    if compiled:
        forwards["compile"] = partial(torch.compile(peft), *arguments)
    large = 2 * s.rows * s.width
    with torch.no_grad():
        yield "lora forward", {name: _no_grad(run) for name, run in forwards.items()}, {"least_bytes": 3 * large}
    steps = {name: partial(s.step, run) for name, run in forwards.items()}
    yield "lora forward + backward", steps, {"least_bytes": 6 * large}


def linear_cases(s: Shapes, p: float, compiled: bool, state: str) -> Iterator[Case]:
    """A whole layer, beside cuBLAS doing its base alone."""
    arguments = (s.x, s.weight, s.A, s.B, p)
    forwards: Providers = {
        "peft": partial(peft_linear, *arguments),
        "safe": partial(safe_linear, *arguments),
        "fused": partial(fused_linear, *arguments),
    }
    if compiled:
        forwards["compile"] = partial(torch.compile(peft_linear), *arguments)
    flops = 4.0 * s.rows * s.width**2
    steps = {name: partial(s.step, run) for name, run in forwards.items()}
    yield f"layer forward + backward, {state}", {"cublas": s.cublas, **steps}, {"least_flops": flops}


def score_cases(s: Shapes, device: torch.device) -> Iterator[Case]:
    """What scoring adds to a forward pass."""
    blocks = RowBlocks.spread(s.rows, device=device)
    statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64, device=device), blocks)
    arguments = (s.x, s.base, s.A, s.B, SCALING)
    runs = {
        "not scored": _no_grad(partial(safe_kernels.lora, *arguments)),
        "safe": _no_grad(partial(safe_kernels.lora, *arguments, statistics=statistics)),
    }
    yield "lora forward, scored", runs, {}


def other_cases(s: Shapes, compiled: bool) -> Iterator[Case]:
    """Norms, gates and dropout; torch.compile's and Liger's beside them."""
    row, large = s.weight[0].contiguous(), 2 * s.rows * s.width

    def stock_norm(x: Tensor) -> Tensor:
        hidden = x.float()
        return row * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def stock_gate(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    norms: Providers = {
        "stock": partial(stock_norm, s.x),
        "safe": lambda: safe_kernels.rms_norm(s.x, row, 1e-6),
    }
    gates: Providers = {
        "stock": partial(stock_gate, s.x, s.base),
        "safe": lambda: safe_kernels.gated_activation(s.x, s.base, "silu"),
    }
    if compiled:
        norms["compile"] = partial(torch.compile(stock_norm), s.x)
        gates["compile"] = partial(torch.compile(stock_gate), s.x, s.base)
    for runs, name in ((norms, "rms_norm"), (gates, "gated silu")):
        if (liger := _liger(name)) is not None:
            tensors = (s.x, row, 1e-6) if name == "rms_norm" else (s.x, s.base)
            runs["liger"] = partial(liger, *tensors)
    # Backward of the norm reads grad and the output, and writes; of the gate it reads three and writes two.
    for name, runs, passes in (("rms_norm", norms, 5), ("gated silu", gates, 8)):
        yield f"{name} forward + backward", _steps(s, runs), {"least_bytes": passes * large}
    drops: Providers = {"stock": lambda: F.dropout(s.x, 0.1), "safe": lambda: _dropout(s.x)}
    yield "dropout forward + backward", _steps(s, drops), {"least_bytes": 4 * large}


def _steps(s: Shapes, runs: Providers) -> Providers:
    return {name: partial(s.step, run) for name, run in runs.items()}


def _dropout(x: Tensor) -> Tensor:
    return safe_kernels.dropout(x, 0.1)


def _liger(name: str) -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerRMSNormFunction.apply if name == "rms_norm" else LigerSiLUMulFunction.apply


def _no_grad(run: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(run)


def all_cases(dry: bool, device: torch.device) -> Iterator[tuple[dict[str, Any], Shapes, Case]]:
    """Every size, with the cases of it; torch.compile beside the middle size only, since it takes long to compile."""
    rows, widths, ranks = (64, (32,), (8,)) if dry else (8192, (2048, 4096, 8192), (8, 16, 64))
    for width, rank, p in product(widths, ranks, (0.0, 0.1)):
        size, middle = {"rows": rows, "d": width, "r": rank, "p": p}, (width, rank) == (4096, 16)
        s = Shapes(rows, width, rank, device)
        frozen = Shapes(rows, width, rank, device, trains=False)
        found = [*lora_cases(s, p, middle), *linear_cases(s, p, middle, "trainable")]
        if p == 0.0:
            found += [*linear_cases(frozen, p, False, "frozen"), *score_cases(s, device)]
            if rank == ranks[0]:
                found += other_cases(s, width == 4096)
        for name, providers, least in found:
            yield size, frozen if name.endswith("frozen") else s, (name, providers, least)


def main() -> None:
    options = arguments(__doc__ or "")
    device = device_of(options)
    torch.manual_seed(0)
    with safe_kernels.autotune(options.autotune, cache=options.out.absolute().parent):
        limits = ceilings(device)
        rows = measure(device, options.dry_run, limits, OWN if options.autotune else ())
    write(options, {"machine": describe(device), "ceilings": limits, "kernels": rows})


def measure(device: torch.device, dry: bool, limits: dict[str, float], only: Collection[str]) -> list[dict[str, Any]]:
    """Every case by all providers, or by `only` some."""
    rows = []
    for size, s, (name, providers, least) in all_cases(dry, device):
        runs = {provider: run for provider, run in providers.items() if not only or provider in only}
        times = {provider: median_ms(run, device, s.leaves) for provider, run in runs.items()}
        floor = least.get("least_bytes", 0) / limits["copy_GB_s"] / 1e6 + least.get("least_flops", 0) / (
            limits["bf16_TFLOP_s"] * 1e9
        )
        rows.append({"case": name, **size, "floor_ms": floor, **least, "ms": times})
        print(f"{name} {size}: " + ", ".join(f"{key} {value['p50']:.3f}" for key, value in times.items()), flush=True)
    return rows


if __name__ == "__main__":
    main()
