"""The kernels of an adapter fill an H200, at the layer shapes and numbers of tokens of real training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

import pytest
import torch
import triton as compiler
from compiling import TARGETS, FakeDriver, meta
from triton.runtime.jit import JITFunction

from safe_kernels import triton
from safe_kernels.triton.runtime import configs

HALF, SINGLE = torch.bfloat16, torch.float32
MULTIPROCESSORS, RANK = 132, 16
SIZES = {  # hidden, of keys and values, of the MLP
    "Llama 1B": (2048, 512, 8192),
    "Llama 8B": (4096, 1024, 14336),
    "Qwen 0.5B": (896, 128, 4864),
    "Qwen 1.5B": (1536, 256, 8960),
    "Qwen 3B": (2048, 256, 11008),
    "Qwen 7B": (3584, 512, 18944),
}
LAYERS = sorted({pair for d, kv, mlp in SIZES.values() for pair in ((d, d), (d, kv), (d, mlp), (mlp, d))})
TOKENS = (512, 1024, 2048, 4096, 8192)
LOOPS = {
    "_lora_sweep_kernel": ("lora_sweep", "split_k", "BLOCK_K"),
    "_lora_apply_kernel": ("lora_apply", "split_n", "BLOCK_N"),
    "_lora_input_kernel": ("lora_input", "group_m", "BLOCK_M"),
}
BUSY_WARPS, BUSY_BYTES = 16, 26 * 1024
"""What keeps a multiprocessor's share of the memory busy: warps, or bytes read ahead (4.3 TB/s for 0.8 us)."""
FEW_TURNS = 4
"""Programs with so few turns are not split further."""
TAKEN = 0.7
"""The share of slots that is enough otherwise: a kernel may have fewer than 16 warps there, and tiles are whole."""


class Launch(NamedTuple):
    """A launch of one kernel over [tokens, columns]."""

    kernel: str
    tokens: int
    columns: int
    programs: int
    warps: int  # of a program
    at_once: int  # programs that fit on a multiprocessor
    turns: int  # of the kernel's loop
    flight: int  # bytes of the large matrix that a program reads ahead; 0 if it computes a mask meanwhile
    sums: int  # bytes of the parts of a sum over rows

    @property
    def busy(self) -> float:
        """Warps at a time on a multiprocessor."""
        return min(self.programs / MULTIPROCESSORS, self.at_once) * self.warps

    @property
    def waves(self) -> float:
        return self.programs / (self.at_once * MULTIPROCESSORS)

    @property
    def tail(self) -> float:
        """The time of the last round's idle slots, as a factor of the time of all rounds."""
        return max(1.0, ceil(self.waves) / self.waves if self.waves > 1 else 1.0)

    @property
    def fills(self) -> bool:
        ahead = min(self.programs / MULTIPROCESSORS, self.at_once) * self.flight
        busy = round(self.busy) >= BUSY_WARPS or ahead >= BUSY_BYTES
        return busy or self.turns <= FEW_TURNS or self.waves >= TAKEN


def entry_of(table: str, given: dict[str, Any]) -> configs.Config:
    """The entry that a launch was made with."""
    names = [name for name in configs.TABLE if name.startswith(table)]
    names = names[::-1] if given.get("HAS_DROPOUT") else names
    entries = [
        entry for name in names for entry in configs.TABLE[name] if entry.terms == (given["PRECISION"] == "terms")
    ]
    return next(entry for entry in entries if entry.constants.items() <= given.items() and entry.rank >= RANK)


def described(kernel: str, given: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    table, split, block = LOOPS[kernel]
    chosen = entry_of(table, given)
    columns = given["K" if table == "lora_sweep" else "N"]
    has_sums = bool(given.get("COMPUTE_A") or given.get("COMPUTE_TRANSPOSED"))
    flags = {"HAS_DROPOUT": "dropped", "COMPUTE_TRANSPOSED": "both"}
    name = " ".join([table, *(word for flag, word in flags.items() if given.get(flag)), given["PRECISION"]])
    groups = grid[0 if table == "lora_sweep" else 1]
    tile = chosen.block_m * (chosen.block_k or chosen.block_n) * 2
    is_product = table == "lora_sweep"  # its loads are pipelined
    return Launch(
        name.replace(" ieee", ""),
        given["M"],
        columns,
        prod(grid),
        chosen.warps,
        chosen.at_once,
        -(-given[split] // given[block]),
        0 if given.get("HAS_DROPOUT") else tile * (chosen.stages - 1 if is_product else 1),
        groups * columns * 64 if has_sums else 0,
    )


@pytest.fixture(scope="module")
def found() -> list[Launch]:
    """Every launch of a training step's layers."""
    made: list[Launch] = []

    def record(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        name = self.__name__
        if name in LOOPS:
            made.append(described(name, dict(zip(self.arg_names, args, strict=False)) | constants, grid))

    compiler.runtime.driver.set_active(FakeDriver(TARGETS["sm_90"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        for (d_in, d_out), N, adapter, p in product(LAYERS, TOKENS, (HALF, SINGLE), (0.0, 0.1)):
            x, grad, weight = meta(N, d_in), meta(N, d_out), meta(d_out, d_in)
            A, B, state = meta(RANK, d_in, dtype=adapter), meta(d_out, RANK, dtype=adapter), meta(2, dtype=torch.int64)
            triton.host_function("lora_linear")(x, weight, None, A, B, 2.0, p, state)
            if p == 0.0:
                triton.host_function("lora")(x, grad, A, B, 2.0, p, state)
            triton.host_function("lora_backward")(grad, x, A, B, 2.0, p, state, [True, True, True])
    return made


def table(found: list[Launch]) -> Iterator[str]:
    yield f"{'kernel':26} {'tokens':>6} {'warps per multiprocessor':>24} {'waves':>11} {'tail':>5}"
    for kernel, tokens in product(sorted({launch.kernel for launch in found}), TOKENS):
        some = [launch for launch in found if (launch.kernel, launch.tokens) == (kernel, tokens)]
        busy, waves = ([getattr(launch, name) for launch in some] for name in ("busy", "waves"))
        span = f"{min(busy):.1f} to {max(busy):.1f}"
        tail = max(launch.tail for launch in some)
        yield f"{kernel:26} {tokens:6} {span:>24} {min(waves):4.2f} to {max(waves):4.2f} {tail:5.2f}"


def test_launches_fill_the_gpu(found: list[Launch]) -> None:
    print("\n".join(table(found)))
    assert len({launch.kernel for launch in found}) == 2 * 6
    assert [launch for launch in found if launch.tokens >= 2048 and not launch.fills] == []


def test_the_last_round_is_short(found: list[Launch]) -> None:
    assert [launch for launch in found if launch.tokens >= 2048 and launch.tail > 1.25] == []
