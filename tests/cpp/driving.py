"""What the drivers of the extension share: its sizes, tensors whose ends are watched, and the loop over their steps.

They run in a build with AddressSanitizer and UBSan. Plain Python on purpose: what matters there is which bytes the
kernels touch, and a test runner would only slow an instrumented process down. Values are compared with the reference
loosely; the tests of the kernels do it closely.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

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


def run(*steps: Callable[[], object]) -> None:
    """Run a driver's steps one after another; the first that fails ends it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for step in steps:
        start = time.perf_counter()
        step()
        print(f"ok  {step.__name__.replace('_', ' ')}  {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(steps)} passed, 0 failed")


def count(default: int) -> int:
    """How many cases to walk: the command's argument, if it has one."""
    return int(sys.argv[1]) if len(sys.argv) > 1 else default


def with_one_and_two_threads(once: Callable[[int], object]) -> None:
    """Four callers at once, with one thread of torch's for each and then with two."""
    for torch_threads in (1, 2):
        torch.set_num_threads(torch_threads)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(once, range(32)))
    torch.set_num_threads(1)


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
    """Raise AssertionError unless both are the same, give or take a coarse rounding."""
    coarse = torch.bfloat16 in (got.dtype, expected.dtype) or got.dtype == torch.float16
    tolerance = 5e-2 if coarse else 1e-3
    scale = 1.0 + expected.double().abs().max().item() if expected.numel() else 1.0
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    if got.shape != expected.shape or not error <= tolerance * scale:
        raise AssertionError(f"{what}: error {error} of {scale}")
