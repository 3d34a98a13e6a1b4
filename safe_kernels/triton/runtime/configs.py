"""Tile sizes, chosen by the GPU's limits and the tiles' contents, never by a GPU's name.

A kernel's entry lists its configurations from the most demanding to the one that runs everywhere. The first one whose
requirements are met is used. tests/triton compiles all of them and checks them against the device's limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton


@dataclass(frozen=True)
class Config:
    """How a kernel is split into programs."""

    block_m: int
    block_n: int = 0  # columns of a tile of the result; 0 if a program computes all of them
    block_k: int = 0  # columns per step of the loop over the summed dimension; 0 without such a loop
    warps: int = 4
    stages: int = 3  # tiles in flight at a time
    at_once: int = 4  # programs that fit on a multiprocessor of sm_90, in all forms of the kernel
    registers: int = 0  # maximum per thread, so that more programs fit; 0: the compiler decides
    shared: int = 0  # KiB of shared memory that a program needs
    half: bool = False  # whether it is only for half-precision factors
    rank: int = 64  # the widest tile of an adapter's columns that it supports
    terms: bool = False  # whether it is only for a bfloat16 matrix and a float32 factor in three terms
    columns: int = 0  # the fewest columns of the large matrix that it is for

    @property
    def options(self) -> dict[str, int]:
        """Options of a launch for the compiler."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @property
    def constants(self) -> dict[str, int]:
        """Constants of a launch: the tiles, and the options."""
        tiles = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        return {name: size for name, size in tiles.items() if size} | self.options

    @property
    def slots(self) -> int:
        """How many programs run at a time on the current device."""
        return self.at_once * target().multiprocessors

    def __str__(self) -> str:
        """Its name in the tuning file."""
        if self == NO_TILES:
            return "no tiles"
        tiles = "x".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)
        return f"{tiles} warps {self.warps} stages {self.stages}"


WIDEST = 2**31
PARTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48)
"""Allowed numbers of parts of a sum; few, because a kernel that reads the parts is compiled for each number."""
NO_TILES = Config(0, rank=2**31)
"""This kernel is not launched: other code computes the same."""

TABLE: dict[str, tuple[Config, ...]] = {
    # With 64 rows fewer parts of a product fill a GPU than with 128.
    "lora_sweep": (
        Config(128, block_k=64, warps=8, at_once=3, shared=200, terms=True, rank=16),
        Config(128, block_k=64, warps=8, at_once=2, shared=200, terms=True, rank=32),
        Config(128, block_k=64, warps=8, at_once=1, shared=200, terms=True),
        Config(128, block_k=64, warps=8, at_once=2, shared=90, terms=True, rank=16),
        Config(64, block_k=32, stages=2, shared=90, terms=True, rank=32),
        Config(64, block_k=128, warps=8, at_once=3, shared=160, half=True, rank=32),
        Config(64, block_k=128, warps=8, at_once=2, shared=160, half=True),
        Config(64, block_k=64, at_once=2, shared=90, half=True, rank=128),
        Config(64, block_k=64, stages=2, at_once=2, half=True, rank=128),
        Config(32, block_k=64, stages=2, at_once=2, rank=32),
        Config(32, block_k=32, stages=2, at_once=3),
    ),
    # After dropout a factor is in registers, and wgmma would wait for it (Triton 3.6); 32 rows make it use mma. Three
    # terms are split again for every tile of rows, so there a tile has many.
    "lora_sweep_dropped": (
        Config(128, block_k=64, warps=8, at_once=2, shared=200, terms=True, rank=16),
        Config(128, block_k=64, warps=8, at_once=1, shared=200, terms=True),
        Config(64, block_k=64, stages=2, shared=90, terms=True, rank=16),
        Config(32, block_k=128, at_once=6, shared=90, half=True, rank=16),
        Config(32, block_k=128, shared=90, half=True, rank=32),
        Config(32, block_k=64, at_once=5, shared=90, half=True),
        Config(32, block_k=64, at_once=3, shared=90, half=True, rank=128),
        Config(32, block_k=64, stages=2, at_once=3, half=True, rank=128),
        Config(32, block_k=64, stages=1, at_once=2, rank=32),
        Config(32, block_k=32, warps=8, stages=1, at_once=1),
    ),
    # Sums over rows are written once per tile, so a tile has many rows.
    "lora_sweep_both": (
        Config(256, block_k=64, warps=8, stages=2, at_once=1, shared=200, terms=True, rank=16),
        Config(256, block_k=64, warps=8, stages=2, at_once=2, half=True, rank=16),
    ),
    "lora_apply": (
        Config(128, 64, warps=8, stages=2, at_once=2, shared=200, terms=True),
        Config(64, 128, at_once=3, shared=160, half=True, columns=1024),
        Config(64, 64, stages=2, half=True, rank=128),
        Config(32, 128, stages=2, at_once=3, rank=32),
        Config(32, 64, stages=2, at_once=2),
    ),
    "lora_input": (
        Config(64, 64, stages=1, shared=200, terms=True, rank=16),
        Config(64, 64, stages=1, at_once=2, shared=200, terms=True, rank=32),
        Config(64, 64, stages=1, at_once=3, shared=90, terms=True, rank=16),
        Config(64, 64, stages=2, at_once=5, shared=200, half=True, rank=32),
        Config(64, 64, warps=8, stages=2, shared=200, half=True),
        Config(64, 64, stages=2, at_once=3, shared=200, half=True, rank=128),
        Config(32, 64, stages=2, shared=90, half=True),
        Config(32, 64, stages=1, at_once=3, half=True, rank=128),
        Config(32, 64, stages=1, rank=16),
        Config(16, 64, stages=1, at_once=2),
    ),
    # With dropout a thread has more to compute, so registers limit the programs that run at a time. With several stages
    # wgmma would wait where only lora_A's gradient is wanted.
    "lora_input_dropped": (
        Config(64, 64, stages=1, at_once=3, registers=168, shared=200, terms=True, rank=16),
        Config(64, 64, stages=1, at_once=2, shared=200, terms=True, rank=32),
        Config(64, 64, stages=1, at_once=2, shared=90, terms=True, rank=16),
        Config(32, 64, stages=1, at_once=5, shared=200, half=True, rank=16),
        Config(32, 64, stages=1, at_once=3, half=True, rank=16),
        Config(64, 64, warps=8, stages=1, at_once=2, shared=200, half=True),
        Config(64, 64, stages=1, at_once=2, shared=200, half=True, rank=128),
        Config(32, 64, stages=2, at_once=2, shared=90, half=True),
        Config(32, 64, stages=1, at_once=2, half=True, rank=128),
        Config(32, 64, stages=1, at_once=3, rank=16),
        Config(16, 64, stages=1, at_once=2),
    ),
    "lora_linear": (NO_TILES,),  # the vendor's library multiplies
    "reduce": (Config(16, 64, stages=1),),
    # A whole block needs the registers of sm_90, or sm_100's tensor memory. On other GPUs four kernels work by tiles.
    "block_parts": (
        Config(128, 32, warps=8, at_once=1, shared=200, terms=True, rank=16),
        Config(128, 64, warps=8, at_once=1, shared=200, half=True, rank=16),
        NO_TILES,
    ),
    # All kernels that score by tiles use these tiles, since they share results. Loads in flight would spill registers.
    "block_tiles": (Config(32, 32, stages=1),),
}
NEIGHBOURS: dict[str, tuple[Config, ...]] = {
    "lora_sweep": (
        Config(128, block_k=64, at_once=3, shared=200, terms=True, rank=16),
        Config(128, block_k=64, warps=8, at_once=3, shared=160, half=True),
        Config(64, block_k=128, warps=8, at_once=1, shared=90, half=True),
        Config(16, block_k=64, stages=2),
    ),
    "lora_sweep_dropped": (
        Config(64, block_k=64, at_once=3, shared=200, terms=True, rank=32),
        Config(32, block_k=128, warps=8, at_once=3, shared=60, half=True),
        Config(16, block_k=128, stages=2, at_once=6, half=True),
        Config(16, block_k=64, stages=2),
    ),
    "lora_sweep_both": (
        Config(256, block_k=64, warps=8, stages=3, at_once=1, shared=160, half=True, rank=16),
        Config(256, block_k=64, warps=8, stages=1, at_once=2, half=True, rank=16),
    ),
    "lora_apply": (
        Config(64, 64, stages=2, shared=200, terms=True, rank=32),
        Config(128, 64, stages=2, at_once=3, shared=200, terms=True, rank=16),
        Config(64, 128, at_once=3, shared=160, half=True),
        Config(64, 64, stages=2, half=True),
        Config(32, 64, stages=2, at_once=9, half=True),
        Config(32, 32, stages=2, at_once=2),
    ),
    "lora_input": (
        Config(64, 64, stages=2, shared=200, terms=True, rank=16),
        Config(32, 64, stages=1, shared=200, terms=True, rank=16),
        Config(64, 64, warps=8, stages=2, shared=200, half=True),
        Config(64, 64, warps=8, stages=1, half=True),
        Config(32, 64, stages=1, at_once=5, shared=90, half=True),
        Config(16, 32, stages=1),
    ),
    "lora_input_dropped": (
        Config(64, 64, stages=2, at_once=2, shared=200, terms=True, rank=16),
        Config(64, 64, stages=1, at_once=3, shared=200, half=True),
        Config(64, 64, warps=8, stages=1, at_once=2, half=True),
        Config(16, 32, stages=1),
    ),
    # 128 x 256 would read less, but there Triton 3.6 waits for each wgmma.
    "lora_linear": (
        Config(128, 128, block_k=64, warps=8, stages=3, shared=160, half=True),
        Config(128, 128, block_k=64, warps=8, stages=4, shared=160, half=True),
        Config(128, 128, block_k=32, warps=8, stages=4, shared=90, half=True),
        Config(128, 64, block_k=64, shared=60, half=True),
        Config(64, 64, block_k=32, stages=2, half=True, rank=32),
        Config(32, 32, block_k=32, stages=1),
    ),
}
"""Configurations that tuning tries in addition to the table's choice. The same tests check their limits."""
SWEEPS = ("lora_sweep", "lora_sweep_dropped", "lora_sweep_both", "lora_apply", "lora_input", "lora_input_dropped")
"""Kernels that are bound by reading: twice the rank per tile halves the reads."""


class Target(NamedTuple):
    """A device as the compiler sees it."""

    backend: str  # "cuda", "hip", or "interpreter"
    shared: int  # KiB of shared memory that a program may use
    arch: str = ""  # such as "90" or "gfx942"
    multiprocessors: int = 0

    @property
    def kind(self) -> str:
        """The same string for devices that run the kernels equally fast; it contains no GPU name."""
        return f"{self.backend}-{self.arch}-{self.multiprocessors}" if self.arch else self.backend


def target() -> Target:
    """The properties of the current device that decide which configurations fit."""
    if triton.knobs.runtime.interpret:
        return Target("interpreter", 0, multiprocessors=64)
    return _target_of(triton.runtime.driver.active.get_current_device())


@lru_cache
def _target_of(device: int) -> Target:
    driver = triton.runtime.driver.active
    properties, found = driver.utils.get_device_properties(device), driver.get_current_target()
    shared = properties["max_shared_mem"] // 1024
    return Target(found.backend, shared, str(found.arch), properties["multiprocessor_count"])


def config(kernel: str, operand: torch.dtype, rank: int = 1, terms: bool = False, columns: int = WIDEST) -> Config:
    """The first entry of `TABLE` whose requirements the current device and the call meet.

    `operand` is the dtype of the factors, or of the elements if nothing is multiplied. `terms`: a factor has three.
    `columns`: of the large matrix.
    """
    return next(entry for entry in TABLE[kernel] if _fits(entry, kernel, operand, rank, terms, columns))


def has_terms(kernel: str, rank: int) -> bool:
    """Whether `TABLE` has an entry for a factor of three terms on the current device."""
    return any(_fits(entry, kernel, torch.bfloat16, rank, terms=True) for entry in TABLE[kernel])


def candidates(
    kernel: str, operand: torch.dtype, rank: int = 1, terms: bool = False, columns: int = WIDEST
) -> list[Config]:
    """The configurations that tuning tries on the current device: the table's choice, and the neighbours that fit.

    For half precision these are only the neighbours for half precision.
    """
    is_half = operand.itemsize == 2 and not terms
    near = (entry for entry in NEIGHBOURS.get(kernel, ()) if entry.half == is_half)
    first = config(kernel, operand, rank, terms, columns)
    others = (entry for entry in near if str(entry) != str(first))
    return [first, *(entry for entry in others if _fits(entry, kernel, operand, rank, terms, columns))]


def _fits(entry: Config, kernel: str, operand: torch.dtype, rank: int, terms: bool, columns: int = WIDEST) -> bool:
    width = rank_tile(rank, torch.float32 if terms else operand, kernel in SWEEPS)
    serves = entry.terms == terms and (operand.itemsize == 2 or not entry.half)
    return serves and width <= entry.rank and target().shared >= entry.shared and columns >= entry.columns


@lru_cache(maxsize=4096)
def rank_tile(rank: int, operand: torch.dtype, is_sweep: bool = False) -> int:
    """Columns of an adapter per tile: at least the minimum of tensor cores, at most as many as fit in registers.

    This is a power of two; a kernel of `SWEEPS` takes up to twice as many. A larger rank takes several tiles.

    Example:
        >>> rank_tile(8, torch.float32), rank_tile(17, torch.float32), rank_tile(200, torch.bfloat16)
        (16, 32, 64)
    """
    most = (64 if operand.itemsize == 2 else 32) * (2 if is_sweep else 1)
    return min(max(16, triton.next_power_of_2(rank)), most)


def float32_precision(wanted: str) -> str:
    """`input_precision` for float32 factors: AMD's matrix cores always multiply float32 exactly."""
    return "ieee" if target().backend == "hip" else wanted


@lru_cache(maxsize=4096)
def splits(tiles: int, length: int, step: int, slots: int, most: int = 32) -> tuple[int, int]:
    """Splits the loop of a launch's programs into parts, one program per part; returns their number and their length.

    The parts fill the GPU, and few programs run alone at the end. A launch takes as many rounds as its programs take
    `slots`, and each round as many turns as a program; to start and end a program takes about as long as two turns.

    Args:
        tiles: programs of one part.
        length: of the loop.
        step: of a turn of the loop.
        slots: programs that run at a time, see `Config.slots`.
        most: the largest number of parts.

    Example:
        >>> splits(tiles=16, length=4096, step=128, slots=132), splits(tiles=512, length=4096, step=128, slots=132)
        ((8, 512), (1, 4096))
    """
    turns = triton.cdiv(length, step)
    possible = [parts for parts in PARTS if parts <= most and 2 * parts <= turns] or [1]
    parts = min(possible, key=lambda parts: triton.cdiv(tiles * parts, slots) * (triton.cdiv(turns, parts) + 2))
    return parts, triton.cdiv(turns, parts) * step


def elementwise_config(N: int) -> Config:
    """Tiles of an element-wise kernel over N columns: 2,048 elements, 16 per thread.

    Example:
        >>> elementwise_config(4096).block_n, elementwise_config(33).block_n
        (256, 64)
    """
    width = min(max(16, triton.next_power_of_2(N)), 256)
    return Config(2048 // width, width, stages=1)


def row_config(N: int) -> Config:
    """Tiles that hold whole rows of N columns: at least 2,048 elements, at most 16 per thread.

    Example:
        >>> row_config(576).block_m, row_config(8192).warps
        (2, 16)
    """
    width = max(16, triton.next_power_of_2(N))
    return Config(max(1, 2048 // width), width, warps=min(max(4, width // 512), 16), stages=1)
