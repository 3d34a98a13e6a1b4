"""What the ops cost on a GPU, counted without one: launches, bytes, warp instructions, and the time of a model.

pytest -rP bench/kernels/bench_costs.py

Host functions are called with tensors without memory, and what they launch is compiled for sm_90. The model adds the
times of bytes, instructions and launches, as if nothing overlapped. Its constants are from the only measurement of
single ops (bench/results/gpu.json, an H200). The time of a base layer's own products is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from compiling import collecting, instructions, meta
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from safe_kernels.triton import host_function

TOKENS, RANK, SCALING = 8192, 16, 2.0
LLAMA = {2048: (512, 8192), 4096: (1024, 14336), 8192: (1024, 28672)}
"""Widths of Llama 1B, 8B and 70B: of hidden states, of keys, and of the MLP."""
WIDTHS = tuple(LLAMA)
HALF, SINGLE = torch.bfloat16, torch.float32
BANDWIDTH, ISSUED, START = 0.87 * 4.25e12, 9.3e11, 1.5e-6
"""Bytes per second of a kernel, warp instructions per second of all schedulers, seconds per launch."""
LOOPS = {
    "_lora_sweep_kernel": ("split_k", "BLOCK_K"),
    "_lora_apply_kernel": ("split_n", "BLOCK_N"),
    "_lora_input_kernel": ("group_m", "BLOCK_M"),
    "_norm_backward_kernel": ("rows_per_program", "BLOCK_M"),
}
"""The length of a kernel's loop and of a turn. Loops over the parts of a sum count as one turn."""
Call = Callable[[], Any]
instructions = cache(instructions)


class Cost(NamedTuple):
    """Of one or several launches; instructions are those of whole warps."""

    launches: int
    bytes: int = 0
    instructions: int = 0

    @property
    def microseconds(self) -> float:
        return 1e6 * (self.bytes / BANDWIDTH + self.instructions / ISSUED + self.launches * START)


class Counter(TorchDispatchMode):
    """Counts the launches of host functions, and of the two kernels of PyTorch that they need."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm_.default:  # the base layer's product also reads what it is added to
            self.costs.append(Cost(1, args[0].nbytes))
        elif func is torch.ops.aten.randint.low:  # dropout's random state
            self.costs.append(Cost(1))
        return func(*args, **(kwargs or {}))

    def launched(self, name: str, kernel: Any, grid: tuple[int, ...], given: dict[str, Any]) -> None:
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        moved = sum({tensor.untyped_storage()._cdata: tensor.nbytes for tensor in tensors}.values())
        length, turn = (given.get(key, 1) for key in LOOPS.get(name, ("", "")))
        loop, whole = instructions(kernel)
        per_warp = whole + (-(-length // turn) - 1) * loop
        self.costs.append(Cost(1, moved, prod(grid) * kernel.metadata.num_warps * per_warp))


def cost(call: Call) -> Cost:
    counter = Counter()
    with collecting("sm_90"), pytest.MonkeyPatch.context() as patch, counter:
        compile_only = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=warmup, **constants)
            given = dict(zip(self.arg_names, args, strict=False)) | constants
            counter.launched(self.__name__, kernel, grid, given)
            return kernel

        patch.setattr(JITFunction, "run", run)
        call()
    return Cost(*map(sum, zip(*counter.costs, strict=True)))


def layer(op: str, d_in: int, d_out: int, adapter: torch.dtype, p: float = 0.1, trains: bool = True) -> None:
    """Forward and backward of `lora` or `lora_linear`."""
    x, base, weight = meta(TOKENS, d_in), meta(TOKENS, d_out), meta(d_out, d_in)
    A, B = meta(RANK, d_in, dtype=adapter), meta(d_out, RANK, dtype=adapter)
    state = torch.randint(-(2**63), 2**63 - 1, (2,), device="meta") if p else None
    rest, kept = (A, B, SCALING, p, state), x if trains else None
    if op == "lora":
        host_function(op)(x, base, *rest, None, 0, None)
        host_function(f"{op}_backward")(base, kept, *rest, [True, trains, trains])
    else:
        host_function(op)(x, weight, None, *rest)
        host_function(f"{op}_backward")(base, kept, weight, *rest, [True, False, False, trains, trains])


def block(d: int, adapter: torch.dtype) -> None:
    """The seven layers of a block of Llama."""
    kv, mlp = LLAMA[d]
    for d_in, d_out in ((d, d), (d, kv), (d, kv), (d, d), (d, mlp), (d, mlp), (mlp, d)):
        layer("lora_linear", d_in, d_out, adapter)


def norm(d: int) -> None:
    x, weight = meta(TOKENS, d), meta(d)
    host_function("rms_norm")(x, weight, 1e-6, 0.0, True)
    rstd = meta(TOKENS, dtype=torch.float32)
    host_function("rms_norm_backward")(x, x, weight, rstd, 0.0, True, [True, False])


def rotary(d: int) -> None:
    """Queries and keys of a block of Llama."""
    width = 64 if d == 2048 else 128
    angles = meta(1, TOKENS, width)
    for features in (d, LLAMA[d][0]):
        for transposed in (False, True):
            host_function("rotary")(meta(1, TOKENS, features // width, width), angles, angles, transposed)


CASES: dict[str, tuple[Callable[[int], None], str]] = {
    "`lora_linear`": (lambda d: layer("lora_linear", d, d, HALF), "11 17.0 2.48 142 260 496"),
    "`lora_linear`, fp32": (lambda d: layer("lora_linear", d, d, SINGLE), "11 18.4 6.91 227 433 844"),
    "`lora_linear`, frozen": (lambda d: layer("lora_linear", d, d, HALF, 0.0, False), "7 12.3 0.55 79 142 268"),
    "`lora`": (lambda d: layer("lora", d, d, HALF), "9 15.0 2.55 131 242 462"),
    "`lora`, fp32": (lambda d: layer("lora", d, d, SINGLE), "9 16.4 6.99 217 415 810"),
    "Llama block": (lambda d: block(d, HALF), "77 166.8 23.57 1395 2480 4755"),
    "Llama block, fp32": (lambda d: block(d, SINGLE), "77 182.3 67.38 2311 4201 8175"),
    "`rotary`": (rotary, "28 63.0 ? 328 613 1067"),
    "`rms_norm`": (norm, "2 8.0 1.38 64 125 250"),
}
"""Forward and backward, with dropout 0.1 where the adapter trains, and what this module counted at commit 27fbf1b with
the names of that commit in `LOOPS`. For `rotary`: the launches and bytes of transformers' function."""


@pytest.mark.parametrize("name", CASES)
def test_cost(name: str) -> None:
    """Prints a row of docs/tuning.md; bytes and instructions are per element of x at the middle width."""
    call, before = CASES[name]
    found = [cost(partial(call, d)) for d in WIDTHS]
    middle, elements = found[1], TOKENS * WIDTHS[1]
    times = [each.microseconds for each in found]
    after = [str(middle.launches), f"{middle.bytes / elements:.1f}", f"{middle.instructions / elements:.2f}"]
    after += [f"{time:.0f}" for time in times]
    pairs = list(zip(before.split(), after, strict=True))
    print("", name, *(old if old == new else f"{old} → {new}" for old, new in pairs), "", sep=" | ")
    assert all(int(new) <= int(old) for old, new in pairs[3:])
