"""Tile sizes, by what a GPU can do and what the tiles hold; never by a GPU's name.

A kernel's entry lists its configurations from the most demanding to the one that runs everywhere; the first whose
demands are met is taken. tests/triton compiles every one of them and holds it to its device's limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile of the result; 0 where a program makes all of them.
        block_k: columns taken at a time of what is summed over; 0 where a kernel has no such loop.
        warps: warps a program.
        stages: tiles in flight at a time.
        shared: KiB of shared memory that a program must be able to have.
        half: whether it is for factors of half precision only.
        rank: widest tile of an adapter's columns it is for.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 3
    shared: int = 0
    half: bool = False
    rank: int = 64

    @property
    def options(self) -> dict[str, int]:
        """What a launch passes on to the compiler."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        """What tuning's file calls it."""
        if self == NO_TILES:
            return "no tiles"
        tiles = "x".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)
        return f"{tiles} warps {self.warps} stages {self.stages}"


NO_TILES = Config(0, rank=2**31)
"""The kernel is not launched: what it does is done otherwise."""

TABLE: dict[str, tuple[Config, ...]] = {
    "lora_sweep": (
        Config(128, block_k=64, warps=8, shared=160, half=True),
        Config(64, block_k=64, shared=90, half=True, rank=128),
        Config(64, block_k=64, stages=2, half=True, rank=128),
        Config(32, block_k=64, stages=2, rank=32),
        Config(32, block_k=32, stages=2),
    ),
    # After dropout a factor lies in registers, where wgmma would wait for it (triton 3.6): 32 rows take mma instead.
    "lora_sweep_dropped": (
        Config(32, block_k=128, shared=90, half=True, rank=32),
        Config(32, block_k=64, shared=90, half=True, rank=128),
        Config(32, block_k=64, stages=2, half=True, rank=128),
        Config(32, block_k=64, stages=1, rank=32),
        Config(32, block_k=32, warps=8, stages=1),
    ),
    # The fewer the rows, the larger the parts of what is summed over them.
    "lora_sweep_both": (Config(256, block_k=64, warps=8, stages=2, half=True, rank=16),),
    "lora_apply": (
        Config(64, 64, stages=2, half=True, rank=128),
        Config(32, 128, stages=2, rank=32),
        Config(32, 64, stages=2),
    ),
    "lora_input": (
        Config(64, 64, warps=8, stages=2, shared=200, half=True),
        Config(64, 64, stages=2, shared=200, half=True, rank=128),
        Config(32, 64, stages=2, shared=90, half=True),
        Config(32, 64, stages=1, half=True, rank=128),
        Config(32, 64, stages=1, rank=16),
        Config(16, 64, stages=1),
    ),
    "lora_linear": (NO_TILES,),  # but the vendor's library
    "reduce": (Config(16, 64, stages=1),),
    # A whole block takes the registers of sm_90, or sm_100's tensor memory; elsewhere four kernels take it by tiles.
    "block_parts": (Config(128, 16, warps=8, stages=1, shared=200, half=True, rank=16), NO_TILES),
    # Of all kernels that score by tiles, since they share what they make. Loads in flight would spill registers.
    "block_tiles": (Config(32, 32, stages=1),),
}
NEIGHBOURS: dict[str, tuple[Config, ...]] = {
    "lora_sweep": (Config(64, block_k=128, warps=8, shared=90, half=True), Config(16, block_k=64, stages=2)),
    "lora_sweep_dropped": (
        Config(32, block_k=128, warps=8, shared=60, half=True),
        Config(16, block_k=128, stages=2, half=True),
        Config(16, block_k=64, stages=2),
    ),
    "lora_sweep_both": (
        Config(256, block_k=64, warps=8, stages=3, shared=160, half=True, rank=16),
        Config(256, block_k=64, warps=8, stages=1, half=True, rank=16),
    ),
    "lora_apply": (
        Config(64, 128, shared=160, half=True),
        Config(32, 64, stages=2, half=True),
        Config(32, 32, stages=2),
    ),
    "lora_input": (
        Config(64, 64, stages=2, shared=200, half=True),
        Config(64, 64, warps=8, stages=1, half=True),
        Config(32, 64, stages=1, shared=90, half=True),
        Config(16, 32, stages=1),
    ),
    # 128 x 256 would read less, but triton 3.6 waits for each wgmma there.
    "lora_linear": (
        Config(128, 128, block_k=64, warps=8, stages=3, shared=160, half=True),
        Config(128, 128, block_k=64, warps=8, stages=4, shared=160, half=True),
        Config(128, 128, block_k=32, warps=8, stages=4, shared=90, half=True),
        Config(128, 64, block_k=64, shared=60, half=True),
        Config(64, 64, block_k=32, stages=2, half=True, rank=32),
        Config(32, 32, block_k=32, stages=1),
    ),
}
"""What tuning tries in addition to the table's choice; held to the same limits by the same tests."""
SWEEPS = ("lora_sweep", "lora_sweep_dropped", "lora_sweep_both", "lora_apply", "lora_input")
"""Kernels whose time is that of reading: they take twice the rank at a time, and read as rarely."""


class Target(NamedTuple):
    """A device as the compiler sees it.

    Attributes:
        backend: "cuda", "hip", or "interpreter".
        shared: KiB of shared memory a program may have.
        arch: of the backend's architectures, the device's: "90", or "gfx942".
        multiprocessors: how many run programs at a time.
    """

    backend: str
    shared: int
    arch: str = ""
    multiprocessors: int = 0

    @property
    def kind(self) -> str:
        """What devices have in common that run the same kernels equally fast; no GPU's name."""
        return f"{self.backend}-{self.arch}-{self.multiprocessors}" if self.arch else self.backend


def target() -> Target:
    """The current device.

    Returns:
        What configurations depend on.

    Example:
        >>> target()  # doctest: +SKIP
        Target(backend='cuda', shared=227, arch='90', multiprocessors=132)
    """
    if triton.knobs.runtime.interpret:
        return Target("interpreter", 0)
    return _target_of(triton.runtime.driver.active.get_current_device())


@lru_cache
def _target_of(device: int) -> Target:
    driver = triton.runtime.driver.active
    properties, found = driver.utils.get_device_properties(device), driver.get_current_target()
    shared = properties["max_shared_mem"] // 1024
    return Target(found.backend, shared, str(found.arch), properties["multiprocessor_count"])


def config(kernel: str, operand: torch.dtype, rank: int = 1) -> Config:
    """The configuration a kernel takes on the current device.

    Args:
        kernel: its name in `TABLE`.
        operand: dtype of the factors, or of the elements where nothing is multiplied.
        rank: the adapter's rank, where there is one.

    Returns:
        The first entry whose demands are met.
    """
    half, width, shared = operand.itemsize == 2, rank_tile(rank, operand, kernel in SWEEPS), target().shared
    return next(entry for entry in TABLE[kernel] if _fits(entry, half, width, shared))


def candidates(kernel: str, operand: torch.dtype, rank: int = 1) -> list[Config]:
    """The configurations that tuning tries on the current device.

    Args:
        kernel: its name in `TABLE`.
        operand: dtype of the factors.
        rank: the adapter's rank.

    Returns:
        The table's choice, and those neighbours whose demands are met; for half precision those alone that are meant
        for it.
    """
    half, width, shared = operand.itemsize == 2, rank_tile(rank, operand, kernel in SWEEPS), target().shared
    near = (entry for entry in NEIGHBOURS.get(kernel, ()) if entry.half == half)
    return [config(kernel, operand, rank), *(entry for entry in near if _fits(entry, half, width, shared))]


def _fits(entry: Config, half: bool, width: int, shared: int) -> bool:
    return (half or not entry.half) and width <= entry.rank and shared >= entry.shared


def rank_tile(rank: int, operand: torch.dtype, is_sweep: bool = False) -> int:
    """Columns of an adapter taken at a time: what tensor cores need at least, and registers hold at most.

    Args:
        rank: the adapter's rank.
        operand: dtype of the factors.
        is_sweep: whether it is for one of `SWEEPS`.

    Returns:
        16 or 32, or 64 in half precision, for a sweep twice that; a larger rank is walked in pieces.

    Example:
        >>> rank_tile(8, torch.float32), rank_tile(17, torch.float32), rank_tile(200, torch.bfloat16)
        (16, 32, 64)
    """
    most = (64 if operand.itemsize == 2 else 32) * (2 if is_sweep else 1)
    return min(max(16, 1 << max(rank - 1, 0).bit_length()), most)


def float32_precision(wanted: str) -> str:
    """`input_precision` for float32 factors: AMD's matrix cores multiply float32 exactly, and know nothing else.

    Args:
        wanted: "tf32" or "tf32x3".

    Returns:
        What the device has.
    """
    return "ieee" if target().backend == "hip" else wanted


def splits(programs: int, length: int, tile: int, enough: int = 256, most: int = 8) -> tuple[int, int]:
    """Cuts a sum over `length` into parts, so that a small problem fills a GPU as well.

    Args:
        programs: how many programs there are with one part each.
        length: what is summed over.
        tile: how much a program takes at a time; a part has two of them, or it is the only one.
        enough: how many programs fill a GPU.
        most: how many parts there may be.

    Returns:
        The number of parts (1, 2, 4, 8, ...), and the length of one, a multiple of `tile`.

    Example:
        >>> splits(programs=16, length=4096, tile=128), splits(programs=512, length=4096, tile=128)
        ((8, 512), (1, 4096))
    """
    parts = 1
    while parts < most and programs * parts < enough and length >= 4 * tile * parts:
        parts *= 2
    return parts, -(-length // (parts * tile)) * tile


def elementwise_config(N: int) -> Config:
    """Tiles of an element-wise kernel: 2,048 elements, 16 a thread.

    Args:
        N: columns of the tensors.

    Returns:
        Tiles that are wide where the tensors are.

    Example:
        >>> elementwise_config(4096).block_n, elementwise_config(33).block_n
        (256, 64)
    """
    width = min(max(16, 1 << max(N - 1, 0).bit_length()), 256)
    return Config(2048 // width, width, stages=1)


def row_config(N: int) -> Config:
    """Tiles that hold whole rows: at least 2,048 elements, at most 16 a thread.

    Args:
        N: columns of the rows.

    Returns:
        Several short rows per program, or a long one and more warps.

    Example:
        >>> row_config(576).block_m, row_config(8192).warps
        (2, 16)
    """
    width = max(16, 1 << max(N - 1, 0).bit_length())
    return Config(max(1, 2048 // width), width, warps=min(max(4, width // 512), 16), stages=1)
