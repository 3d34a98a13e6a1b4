"""Every public op on a few rows, and the same in plain PyTorch: what surrounds a call is tried on all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from oracle import keep_mask, rounded
from torch import Tensor

import safe_kernels

STATE = torch.tensor([7, -3])
DROPOUT_P = 0.25
ROWS, D_IN, D_OUT, RANK = 6, 5, 4, 2


@dataclass(frozen=True)
class Case:
    """One op and its stock formula, both of the same tensors.

    Args:
        op: ours.
        stock: the same in PyTorch's own ops.
        shapes: of the tensors that may require grad.
    """

    op: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, trains: Sequence[bool] | bool = True, seed: int = 0) -> list[Tensor]:
        """Float64 leaves; `trains` says which of them require grad."""
        generator = torch.Generator().manual_seed(seed)
        flags = [trains] * len(self.shapes) if isinstance(trains, bool) else trains
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return [tensor.requires_grad_(flag) for tensor, flag in zip(tensors, flags, strict=True)]


def drop(x: Tensor) -> Tensor:
    keep = torch.from_numpy(keep_mask(ROWS, x.shape[-1], DROPOUT_P, STATE))
    return x * keep / (1 - rounded(DROPOUT_P))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight


WEIGHT = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

TARGET = torch.tensor([[0, 3], [-100, 2], [1, 1]])

ANGLES = torch.randn(2, 1, 2, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = ANGLES.unsqueeze(3)
    return x * cos + torch.cat((-second, first), -1) * sin


def dora(x: Tensor, bias: Tensor, A: Tensor, B: Tensor, magnitude: Tensor) -> Tensor:
    scale = magnitude / (WEIGHT + 2.0 * (B @ A).detach()).norm(dim=1)
    return F.linear(x, WEIGHT, bias) + (scale - 1) * (drop(x) @ WEIGHT.mT) + 2.0 * scale * (drop(x) @ A.mT @ B.mT)


KERNEL = torch.randn(D_OUT, 3, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def lora_conv(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    dropped = drop(x.flatten(0, 1)).unflatten(0, (2, 3))
    return F.conv1d(x, KERNEL, bias, padding=1) + 2.0 * F.conv1d(F.conv1d(dropped, A, padding=1), B)


X, OUT, FEATURES = (ROWS, D_IN), (ROWS, D_OUT), (D_IN,)
ADAPTER = ((RANK, D_IN), (D_OUT, RANK))

CASES: dict[str, Case] = {
    "lora": Case(
        lambda x, base, A, B: safe_kernels.lora(x, base, A, B, 2.0, dropout_p=DROPOUT_P, rng_state=STATE),
        lambda x, base, A, B: base + 2.0 * (drop(x) @ A.mT) @ B.mT,
        (X, OUT, *ADAPTER),
    ),
    "lora_linear": Case(
        lambda x, W, b, A, B: safe_kernels.lora_linear(x, W, b, A, B, 2.0, dropout_p=DROPOUT_P, rng_state=STATE),
        lambda x, W, b, A, B: F.linear(x, W, b) + 2.0 * (drop(x) @ A.mT) @ B.mT,
        (X, (D_OUT, D_IN), (D_OUT,), *ADAPTER),
    ),
    "bottleneck": Case(
        lambda x, *others: safe_kernels.bottleneck(x, *others, "gelu", 2.0, dropout_p=DROPOUT_P, rng_state=STATE),
        lambda x, residual, W, b, W_up, b_up: residual + 2.0 * F.linear(drop(F.gelu(F.linear(x, W, b))), W_up, b_up),
        (X, OUT, (RANK, D_IN), (RANK,), (D_OUT, RANK), (D_OUT,)),
    ),
    "dora": Case(
        lambda x, b, A, B, m: safe_kernels.dora(x, WEIGHT, b, A, B, m, 2.0, dropout_p=DROPOUT_P, rng_state=STATE),
        dora,
        (X, (D_OUT,), *ADAPTER, (D_OUT,)),
    ),
    "lora_conv": Case(
        lambda x, b, A, B: safe_kernels.lora_conv(
            x, KERNEL, b, A, B, 2.0, (1,), (1,), (1,), dropout_p=DROPOUT_P, rng_state=STATE
        ),
        lora_conv,
        ((2, 3, D_IN), (D_OUT,), (RANK, 3, 3), (D_OUT, RANK, 1)),
    ),
    "rms_norm": Case(lambda x, weight: safe_kernels.rms_norm(x, weight, 1e-3), rms, (X, FEATURES)),
    "layer_norm": Case(
        lambda x, weight, bias: safe_kernels.layer_norm(x, weight, bias, 1e-3),
        lambda x, weight, bias: F.layer_norm(x, (D_IN,), weight, bias, 1e-3),
        (X, FEATURES, FEATURES),
    ),
    "linear_cross_entropy": Case(
        lambda x: safe_kernels.linear_cross_entropy(x, WEIGHT, None, TARGET, softcap=3.0),
        lambda x: F.cross_entropy(3.0 * torch.tanh(F.linear(x, WEIGHT) / 3.0).mT, TARGET, reduction="none"),
        ((3, 2, D_IN),),
    ),
    "activation": Case(
        lambda x: safe_kernels.activation(x, "gelu", dropout_p=DROPOUT_P, rng_state=STATE),
        lambda x: drop(F.gelu(x)),
        (X,),
    ),
    "gated_activation": Case(
        lambda gate, up: safe_kernels.gated_activation(gate, up, "silu", dropout_p=DROPOUT_P, rng_state=STATE),
        lambda gate, up: drop(F.silu(gate) * up),
        (X, X),
    ),
    "rotary": Case(lambda x: torch.ops.safe_kernels.rotary(x, *ANGLES), rotate, ((2, 2, 2, 4),)),
    "dropout": Case(lambda x: safe_kernels.dropout(x, DROPOUT_P, rng_state=STATE), drop, (X,)),
    "activation into lora": Case(  # `lora` retains what makes x again
        lambda gate, A, B: safe_kernels.lora(
            safe_kernels.activation(gate, "gelu"), gate.new_zeros(OUT), A, B, 2.0, dropout_p=DROPOUT_P, rng_state=STATE
        ),
        lambda gate, A, B: 2.0 * (drop(F.gelu(gate)) @ A.mT) @ B.mT,
        (X, *ADAPTER),
    ),
}
