"""Drives the activations and dropout through shapes, dtypes, strides and the graph."""

from __future__ import annotations

import itertools

import torch
from driving import ROWS, WIDTHS, close, exactly, run, views
from torch import Tensor

import safe_kernels
from safe_kernels import reference

KINDS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def once(gate: Tensor, up: Tensor, grad: Tensor, kind: str, dropout_p: float, seed: int) -> None:
    """Every op on these rows, compared with its reference."""
    state = torch.tensor([seed, -seed])
    what = f"{list(gate.shape)} {gate.dtype} {kind} p {dropout_p}"
    calls = {
        "activation": (gate, kind, dropout_p, state),
        "activation_backward": (grad, gate, kind, dropout_p, state),
        "dropout": (gate, dropout_p, state),
        "gated_activation": (gate, up, kind, dropout_p, state),
    }
    for name, arguments in calls.items():
        close(
            getattr(torch.ops.safe_kernels, name)(*arguments), getattr(reference, name)(*arguments), f"{name}: {what}"
        )
    for mask in itertools.product([True, False], repeat=2):
        arguments = (grad, gate, up, kind, dropout_p, state, list(mask))
        got = torch.ops.safe_kernels.gated_activation_backward(*arguments)
        for a, b in zip(got, reference.gated_activation_backward(*arguments), strict=True):
            close(a, b, f"gated_activation_backward {mask}: {what}")


def rotated(rows: int, width: int, dtype: torch.dtype, transposed: bool) -> None:
    """Rows are tokens of two samples with three heads; an odd last feature is copied."""
    x, *angles = (
        exactly(torch.randn(size).to(dtype)) for size in [(2, rows, 3, width)] + [(1, rows, width // 2 * 2)] * 2
    )
    arguments = (x, *angles, transposed)
    close(torch.ops.safe_kernels.rotary(*arguments), reference.rotary(*arguments), f"rotary: {list(x.shape)} {dtype}")


def problem(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    return [exactly((2 * torch.randn(rows, width)).to(dtype)) for _ in range(3)]


def many_shapes() -> None:
    for i, (rows, width) in enumerate(itertools.product(ROWS[:7], WIDTHS)):
        rotated(rows, width, DTYPES[i % 4], i % 2 == 0)
        once(*problem(rows, width, DTYPES[i % 4]), KINDS[i // 4 % 4], (0.0, 0.1, 0.9, 1.0)[i % 3], seed=i)


def many_strides() -> None:
    for dtype, kind in itertools.product(DTYPES, KINDS):
        tensors = problem(19, 21, dtype)
        for position, tensor in enumerate(tensors):
            for view in (*views(tensor), tensor[:1].expand(19, -1), tensor[:, :1].expand(-1, 21)):
                once(*tensors[:position], view, *tensors[position + 1 :], kind, 0.1, seed=position)


def special_numbers() -> None:
    special = [torch.inf, -torch.inf, torch.nan, 1e-42, 90.0, -90.0, 3e38, -3e38]
    for kind in KINDS:
        x = torch.tensor(special * 5).requires_grad_()
        safe_kernels.activation(x, kind).sum().backward()
        safe_kernels.gated_activation(x, x, kind).sum().backward()


def through_recipes() -> None:
    """What a reader behind an activation saves, makes again and frees."""
    for dropout_p, change in itertools.product((0.0, 0.3), (False, True)):
        gate, up, _ = (t.requires_grad_() for t in problem(33, 17, torch.float32))
        A, B = torch.randn(5, 17, requires_grad=True), torch.randn(9, 5, requires_grad=True)
        x = safe_kernels.gated_activation(gate, up, "silu", dropout_p=dropout_p)
        outs = [safe_kernels.lora(x, torch.zeros(33, 9), A, B, 1.0, dropout_p=dropout_p) for _ in range(2)]
        if change:
            x.data = torch.zeros_like(x)
        del x
        outs[0].sum().backward(retain_graph=True)
        (outs[0] + outs[1]).sum().backward()


if __name__ == "__main__":
    run(many_shapes, many_strides, special_numbers, through_recipes)
