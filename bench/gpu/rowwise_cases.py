"""Norms, gates, dropout and rotary embeddings, compared with stock operations, torch.compile of these, and Liger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import safe_kernels

from .op_cases import Case, Providers, Run, Shapes, compiled

EPS = 1e-6
HEAD = 64


def rowwise_cases(s: Shapes, size: dict[str, Any]) -> Iterator[Case]:
    large, p = 2 * s.rows * s.width, size["p"]
    row, up = s.weight[0].contiguous(), s.base.clone().requires_grad_()
    norms: Providers = {
        "stock": partial(stock_norm, s.x, row),
        "safe": partial(safe_kernels.rms_norm, s.x, row, EPS),
        "compile": partial(compiled(stock_norm), s.x, row),
    }
    gates: Providers = {
        "stock": partial(stock_gate, s.x, up),
        "safe": partial(safe_kernels.gated_activation, s.x, up, "silu"),
        "compile": partial(compiled(stock_gate), s.x, up),
    }
    drops: Providers = {
        "stock": partial(F.dropout, s.x, p),
        "safe": partial(safe_kernels.dropout, s.x, p),
    }
    angles = torch.ones(2, 1, s.rows, min(HEAD, s.width), dtype=s.x.dtype, device=s.x.device)
    rotations: Providers = {
        "stock": partial(in_heads, stock_rotary, s.x, angles),
        "safe": partial(in_heads, safe_kernels.rotary, s.x, angles),
        "compile": partial(compiled(partial(in_heads, stock_rotary)), s.x, angles),
    }
    # Backward of the norm reads the gradient and the output, and writes; of the gate it reads three and writes two.
    cases = (("rms_norm", norms, 5), ("gated silu", gates, 8), ("dropout", drops, 4), ("rotary", rotations, 4))
    for name, forwards, passes in cases:
        before = add_liger(name, forwards, [s.x, up], row)
        least = {"least_bytes": passes * large}
        yield Case(f"{name} forward + backward", size, s.steps(forwards), [s.x, up], least, before)


def stock_norm(x: Tensor, row: Tensor) -> Tensor:
    """Compute as transformers does."""
    hidden = x.float()
    return row * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def stock_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def in_heads(rotate: Callable[..., Tensor], x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the heads of all rows, which are the tokens of one sample."""
    heads = x.view(1, len(x), -1, angles.shape[-1]).transpose(1, 2)
    return rotate(heads, *angles).transpose(1, 2).reshape(x.shape)


def stock_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute as transformers does."""
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(1)


def add_liger(name: str, forwards: Providers, tensors: list[Tensor], row: Tensor) -> Providers:
    """Add Liger. Its backward writes into its inputs, so it gets copies, new ones before each run."""
    if name in ("dropout", "rotary"):
        return {}
    copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]

    def run() -> Tensor:
        if name == "rms_norm":
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return LigerRMSNormFunction.apply(copies[0], row, EPS, 0.0, "llama", False)  # not in place
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply(*copies)

    @torch.no_grad()
    def renew() -> None:
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.grad = None
            copy.copy_(tensor)

    before: dict[str, Run] = {"liger": renew}
    forwards["liger"] = run
    return before
