"""Drives the extension through many shapes, dtypes, strides and threads, for a build with AddressSanitizer and UBSan.

Plain Python on purpose: what matters here is which bytes the kernels touch, and a test runner would only slow an
instrumented process down. Values are compared with the reference loosely; the tests of the kernels do it closely.
"""

from __future__ import annotations

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import safe_kernels
from safe_kernels import reference

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
# Around the widths of vectors, tiles and blocks, on both sides; and the empty ones.
ROWS = [0, 1, 7, 8, 9, 63, 65, 127, 130, 257]
WIDTHS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 65, 100, 129]
RANKS = [0, 1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 33]


def exactly(tensor: Tensor) -> Tensor:
    """The same values in an allocation that ends where they end, so that a read past them is seen."""
    return tensor.clone(memory_format=torch.contiguous_format)


def views(tensor: Tensor) -> list[Tensor]:
    """The same shape and values with other strides, and misaligned."""
    wide = torch.zeros(tensor.shape[0], 2 * tensor.shape[1] + 1, dtype=tensor.dtype)
    wide[:, 1::2] = tensor
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    shifted[1:] = tensor.flatten()
    return [tensor.t().contiguous().t(), wide[:, 1::2], shifted[1:].view(tensor.shape)]


def close(got: Tensor, expected: Tensor, what: str) -> None:
    coarse = torch.bfloat16 in (got.dtype, expected.dtype) or got.dtype == torch.float16
    tolerance = 5e-2 if coarse else 1e-3
    scale = 1.0 + expected.double().abs().max().item() if expected.numel() else 1.0
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    if got.shape != expected.shape or not error <= tolerance * scale:
        raise AssertionError(f"{what}: error {error} of {scale}")


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


def many_shapes(count: int) -> None:
    for i in range(count):
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


def many_threads(torch_threads: int) -> None:
    torch.set_num_threads(torch_threads)
    problems = [problem(200 + i, 48, 40, 8, DTYPES[i % len(DTYPES)]) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: once(problems[i % 8], 0.1 * (i % 2), [0, 64, 128], 64, seed=i), range(32)))


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
    try:
        safe_kernels.lora(torch.ones(3, 4), torch.ones(3, 4), torch.ones(2, 5), torch.ones(4, 2), 1.0)
    except ValueError:
        return
    raise AssertionError("a wrong shape was accepted")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps = {
        "shapes": lambda: many_shapes(int(sys.argv[1]) if len(sys.argv) > 1 else 440),
        "strides": many_strides,
        "autograd": through_autograd,
        "one torch thread, four callers": lambda: many_threads(1),
        "two torch threads, four callers": lambda: many_threads(2),
    }
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        print(f"ok  {name}  {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(steps)} passed, 0 failed")


if __name__ == "__main__":
    main()
