"""A layer whose activation is rebuilt from its output."""

from __future__ import annotations

import torch
from activations import normal
from oracle import rng_state
from torch import Tensor, nn

import safe_kernels

ROWS, WIDTH, OUT, RANK = 12, 33, 9, 4


STATE = rng_state(11)


class Layer:
    """The last layer of an MLP: its input's makings, its frozen base, and its adapter."""

    def __init__(self, dtype: torch.dtype = torch.float32, kind: str = "silu", dropout_p: float = 0.0) -> None:
        self.kind, self.dropout_p = kind, dropout_p
        self.gate, self.up = (normal(ROWS, WIDTH, dtype=dtype, seed=seed).requires_grad_() for seed in range(2))
        self.weight = normal(OUT, WIDTH, dtype=dtype, seed=2, scale=0.1)
        self.A = nn.Parameter(normal(RANK, WIDTH, dtype=dtype, seed=3, scale=0.2))
        self.B = nn.Parameter(normal(OUT, RANK, dtype=dtype, seed=4, scale=0.5))
        self.leaves = (self.gate, self.up, self.A, self.B)
        self.parameters = (self.weight, self.A, self.B)

    def gated(self, gate: Tensor | None = None, up: Tensor | None = None) -> Tensor:
        gate, up = self.gate if gate is None else gate, self.up if up is None else up
        return safe_kernels.gated_activation(gate, up, self.kind, dropout_p=self.dropout_p, rng_state=STATE)

    def plain(self) -> Tensor:
        return safe_kernels.activation(self.gate, self.kind, dropout_p=self.dropout_p, rng_state=STATE)

    def lora(self, x: Tensor) -> Tensor:
        base = nn.functional.linear(x, self.weight)
        return safe_kernels.lora(x, base, self.A, self.B, 2.0, dropout_p=self.dropout_p, rng_state=STATE)

    def gradients(self, out: Tensor, **kwargs) -> list[Tensor | None]:
        return list(torch.autograd.grad(out.float().square().sum(), self.leaves, allow_unused=True, **kwargs))


def same_bits(got: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(b is a or torch.equal(a, b) for a, b in zip(got, expected, strict=True))
