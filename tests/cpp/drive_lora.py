"""Drives `lora` through many shapes, dtypes, strides and threads."""

from __future__ import annotations

import itertools

import torch
from driving import DTYPES, ROWS, WIDTHS, close, count, exactly, run, views, with_one_and_two_threads
from torch import Tensor

import safe_kernels
from safe_kernels import reference

RANKS = [0, 1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 33]


def once(inputs: tuple[Tensor, ...], dropout_p: float, starts: list[int], block_rows: int, seed: int) -> None:
    """One forward with statistics and one backward for every output mask."""
    x, base, A, B = inputs
    state = torch.tensor([seed, -seed]) if dropout_p > 0 else None
    weight = torch.arange(x.shape[0]) % 5 != 3
    blocks = (torch.tensor(starts, dtype=torch.int64), block_rows, weight)
    arguments = (*inputs, 0.5, dropout_p, state, *blocks)
    what = f"x {list(x.shape)} out {list(base.shape)} r {A.shape[0]} {x.dtype}/{A.dtype} p {dropout_p}"
    results = torch.ops.safe_kernels.lora(*arguments)
    for name, got, expected in zip(("out", "statistics"), results, reference.lora(*arguments), strict=True):
        close(got, expected, f"{name}: {what}")
    grad = exactly(torch.randn(base.shape).to(base.dtype))
    for mask in itertools.product([True, False], repeat=3):
        given = x if mask[1] or mask[2] else None
        arguments = (grad, given, A, B, 0.5, dropout_p, state, list(mask))
        got, expected = torch.ops.safe_kernels.lora_backward(*arguments), reference.lora_backward(*arguments)
        for name, a, b in zip(("grad_x", "grad_A", "grad_B"), got, expected, strict=True):
            close(a, b, f"{name}: {what}")


def problem(rows: int, d_in: int, d_out: int, rank: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, ...]:
    sizes = [(rows, d_in), (rows, d_out), (rank, d_in), (d_out, rank)]
    kinds = [dtypes[0], dtypes[0], dtypes[1], dtypes[1]]
    return tuple(exactly(torch.randn(size).to(kind)) for size, kind in zip(sizes, kinds, strict=True))


def many_shapes() -> None:
    for i in range(count(440)):
        rows, rank = ROWS[i % len(ROWS)], RANKS[i % len(RANKS)]
        d_in, d_out = WIDTHS[i % len(WIDTHS)], WIDTHS[(5 * i + i // len(WIDTHS)) % len(WIDTHS)]
        starts = [] if rows == 0 else sorted({0, rows // 3, rows - 1})
        inputs = problem(rows, d_in, d_out, rank, DTYPES[i % len(DTYPES)])
        once(inputs, (0.0, 0.1, 0.9, 1.0)[i % 4], starts, (1, 7, 24, 128, 400)[i % 5], seed=i)


def many_strides() -> None:
    for dtypes in DTYPES:
        inputs = problem(37, 21, 19, 6, dtypes)
        for position, tensor in enumerate(inputs):
            for view in views(tensor):
                once((*inputs[:position], view, *inputs[position + 1 :]), 0.1, [0, 5], 16, seed=position)
        expanded = (inputs[0][:1].expand(37, -1), inputs[1][:, :1].expand(-1, 19), *inputs[2:])
        once(expanded, 0.1, [0], 64, seed=9)


def many_threads() -> None:
    problems = [problem(200 + i, 48, 40, 8, DTYPES[i % len(DTYPES)]) for i in range(8)]
    with_one_and_two_threads(lambda i: once(problems[i % 8], 0.1 * (i % 2), [0, 64, 128], 64, seed=i))


def through_autograd() -> None:
    """What is saved, freed and refused on the way through the graph."""
    for flags in itertools.product([True, False], repeat=4):
        inputs = problem(33, 17, 9, 5, DTYPES[0])
        for tensor, flag in zip(inputs, flags, strict=True):
            tensor.requires_grad_(flag)
        out = safe_kernels.lora(*inputs, 2.0, dropout_p=0.3)
        if any(flags):
            out.sum().backward(retain_graph=True)
            out.sum().backward()


if __name__ == "__main__":
    run(many_shapes, many_strides, through_autograd, many_threads)
