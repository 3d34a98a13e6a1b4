"""Single ops in bf16, compared with PEFT's operations, with torch.compile of these, with Liger and with cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks

SCALING = 2.0
Run = Callable[[], Any]
Providers = dict[str, Run]


@dataclass
class Case:
    """One case that is timed.

    Attributes:
        name: of the case.
        size: of the problem.
        runs: by provider.
        leaves: tensors whose gradients are dropped before each run.
        least: the fewest bytes and FLOPs that the case needs.
        before: by provider, a function that is called before every run, untimed.
    """

    name: str
    size: dict[str, Any]
    runs: Providers
    leaves: list[Tensor]
    least: dict[str, float]
    before: Providers = field(default_factory=dict)

    def prepare(self, provider: str) -> None:
        for tensor in self.leaves:
            tensor.grad = None
        self.before.get(provider, lambda: None)()


def peft(x: Tensor, base: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    """Compute as PEFT does; its adapters are in float32 by default."""
    return (base + F.linear(F.linear(F.dropout(x.to(A.dtype), p), A), B) * SCALING).to(base.dtype)


def peft_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return peft(x, F.linear(x, weight), A, B, p)


def safe(x: Tensor, base: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return safe_kernels.lora(x, base, A, B, SCALING, dropout_p=p)


def safe_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return safe(x, F.linear(x, weight), A, B, p)


def fused_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
    return safe_kernels.lora_linear(x, weight, None, A, B, SCALING, dropout_p=p)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For one size alone, as a training has one."""
    return torch.compile(function, dynamic=False, backend="inductor" if torch.cuda.is_available() else "aot_eager")


class Shapes:
    """Random tensors of one size; x and the adapter want gradients."""

    def __init__(
        self,
        rows: int,
        width: int,
        rank: int,
        device: torch.device,
        trains: bool = True,
        adapter: torch.dtype = torch.bfloat16,
    ) -> None:
        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return (torch.randn(*shape, device=device) * scale).to(dtype)

        self.rows, self.width = rows, width
        # base wants none: its gradient is the output's own, which autograd would have to copy into a leaf.
        self.x, self.base = normal(rows, width).requires_grad_(), normal(rows, width)
        self.weight, self.grad = normal(width, width, scale=width**-0.5), normal(rows, width)
        self.A = normal(rank, width, scale=width**-0.5, dtype=adapter).requires_grad_(trains)
        self.B = normal(width, rank, scale=rank**-0.5, dtype=adapter).requires_grad_(trains)
        self.leaves = [self.x, self.A, self.B]

    def step(self, forward: Callable[[], Tensor]) -> None:
        forward().backward(self.grad)

    def steps(self, forwards: Providers) -> Providers:
        return {name: partial(self.step, run) for name, run in forwards.items()}

    def cublas(self) -> None:
        """The base layer's products alone: the floor of a layer, forward and backward."""
        F.linear(self.x.detach(), self.weight)
        self.grad @ self.weight


def lora_cases(s: Shapes, size: dict[str, Any], compiles: bool, kind: str = "lora") -> Iterator[Case]:
    """The op over a base layer that is already computed; and the smallest number of bytes it has to move."""
    tensors = (s.x, s.base, s.A, s.B, size["p"])
    forwards: Providers = {"peft": partial(peft, *tensors), "safe": partial(safe, *tensors)}
    if compiles:
        forwards["compile"] = partial(compiled(peft), *tensors)
    large = 2 * s.rows * s.width
    alone = {name: torch.no_grad()(run) for name, run in forwards.items()}
    yield Case(f"{kind} forward", size, alone, [], {"least_bytes": 3 * large})
    # Forward: x, base, the output. Backward: its gradient, x for A's, and x's.
    yield Case(f"{kind} forward + backward", size, s.steps(forwards), s.leaves, {"least_bytes": 6 * large})


def linear_case(s: Shapes, size: dict[str, Any], compiles: bool, state: str) -> Case:
    """A whole layer, compared with cuBLAS for its base alone."""
    tensors = (s.x, s.weight, s.A, s.B, size["p"])
    forwards: Providers = {
        "peft": partial(peft_linear, *tensors),
        "safe": partial(safe_linear, *tensors),
        "fused": partial(fused_linear, *tensors),
    }
    if compiles:
        forwards["compile"] = partial(compiled(peft_linear), *tensors)
    runs = {"cublas": s.cublas, **s.steps(forwards)}
    least = {"least_flops": 4.0 * s.rows * s.width**2}
    return Case(f"layer forward + backward, {state}", size, runs, s.leaves, least)


def score_case(s: Shapes, size: dict[str, Any]) -> Case:
    """What scoring adds to a forward pass."""
    blocks = RowBlocks.spread(s.rows, device=s.x.device)
    statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64, device=s.x.device), blocks)
    tensors = (s.x, s.base, s.A, s.B, SCALING)
    runs: Providers = {
        "not scored": torch.no_grad()(partial(safe_kernels.lora, *tensors)),
        "safe": torch.no_grad()(partial(safe_kernels.lora, *tensors, statistics=statistics)),
    }
    return Case("lora forward, scored", size, runs, [], {"least_bytes": 6 * s.rows * s.width})
