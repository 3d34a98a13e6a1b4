"""The sums that score an adapter, from the sampled rows only; see `safe_kernels.reference.cka_sums`.

Separate launches read the sampled rows again: 2 % of 8,192 rows are a few MB, mostly still in the cache. The pass that
applies the adapter could share its tiles, but then all its programs would need the registers of the few that score, and
blocks would have to begin at its tiles. The fused form (lora_linear) could not share them: it scores the stored output,
with the roles swapped.

K and E are separate float32 sums of products, so that an adapter aligned with its layer keeps its precision. They are
centred in float32. The sums a, b, c are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from safe_kernels.reference.importance import check_blocks
from safe_kernels.triton.lib.cka_kernels import (
    _block_grams_kernel,
    _block_h_kernel,
    _block_means_kernel,
    _block_parts_kernel,
    _block_products_kernel,
    _block_sums_kernel,
    _block_total_kernel,
)
from safe_kernels.triton.runtime.configs import Config, config, float32_precision, rank_tile, splits
from safe_kernels.triton.runtime.host import TYPES, Product, adapter_product
from safe_kernels.triton.runtime.launch_replay import empty, launch

MOST_BLOCKS = 65535
"""CUDA's limit for programs along a grid's second axis."""
MOST_AT_ONCE = 64
"""Up to this many blocks, one program per block is worth the 64 KiB of memory for each part of K."""


def block_sums(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: float,
    block_starts: Tensor,
    block_rows: int,
    row_weight: Tensor | None,
    swapped: bool = False,
) -> Tensor:
    """Scores sampled blocks of rows: float64 [4] = (a, b, c, rows), as `cka_sums` makes them.

    `base` is [M, N], h [parts, M, padded R], and the adapter adds scaling * sum(h) * lora_B'. `swapped`: `base`
    includes the adapter's part.
    """
    check_blocks(base, block_starts, block_rows, row_weight)
    if base.shape[0] == 0 or block_starts.shape[0] == 0:
        return h.new_zeros(4, dtype=torch.float64)
    if block_starts.shape[0] > MOST_BLOCKS:
        parts = block_starts.split(MOST_BLOCKS)
        rest = (block_rows, row_weight, swapped)
        return torch.stack([block_sums(base, h, lora_B, scaling, part, *rest) for part in parts]).sum(0)
    exact = base.dtype == lora_B.dtype == torch.float32
    blocks = Blocks(
        starts=block_starts.contiguous(),
        weight=None if row_weight is None else row_weight.contiguous(),
        block_rows=min(block_rows, base.shape[0]),
        base_rows=base.shape[0],
        scale=-scaling if swapped else scaling,
        precision="ieee" if exact else float32_precision("tf32x3"),
    )
    arithmetic = adapter_product("block_parts", base.dtype, lora_B.dtype, lora_B.shape[1])
    chosen = config("block_parts", arithmetic.operand, lora_B.shape[1], arithmetic.has_terms)
    at_once = blocks.block_rows <= chosen.block_m and blocks.count <= MOST_AT_ONCE
    made = _at_once(base, h, lora_B, blocks, arithmetic, chosen) if at_once else _by_tiles(base, h, lora_B, blocks)
    return _total(_sums(*made, blocks, swapped))


@dataclass(frozen=True)
class Blocks:
    """The blocks, as every launch needs them."""

    starts: Tensor  # int64 [n], contiguous
    weight: Tensor | None  # [M] of any dtype, contiguous, zero where a row does not count
    block_rows: int  # rows per block, at most M
    base_rows: int  # M
    scale: float  # factor of h
    precision: str  # `input_precision` of products

    @property
    def count(self) -> int:
        return self.starts.shape[0]


Parts = tuple[Tensor, Tensor, Tensor]
"""K in parts [n, splits, L, L], V in parts [n, splits, L, width], and H [n, L, width]; L is at least `block_rows`."""


def _at_once(base: Tensor, h: Tensor, lora_B: Tensor, blocks: Blocks, arithmetic: Product, chosen: Config) -> Parts:
    """Each block fits in one program."""
    (M, N), R, width = base.shape, lora_B.shape[1], h.shape[2]
    parts, split_n = splits(blocks.count, N, chosen.block_n, chosen.slots, most=16)
    grams = empty(h, (blocks.count, parts, chosen.block_m, chosen.block_m))
    products = empty(h, (blocks.count, parts, chosen.block_m, width))
    centred = empty(h, (blocks.count, chosen.block_m, width))
    launch(
        _block_parts_kernel,
        (blocks.count, parts),
        base,
        h,
        lora_B,
        blocks.starts,
        blocks.weight,
        grams,
        products,
        centred,
        M,
        N,
        R,
        width,
        blocks.block_rows,
        *base.stride(),
        *lora_B.stride(),
        split_n,
        blocks.scale,
        SPLITS=h.shape[0],
        BLOCK_R=rank_tile(width, torch.float32),
        PRECISION=blocks.precision,
        OPERAND=TYPES[arithmetic.operand],
        ADAPTER=arithmetic.precision,
        **chosen.constants,
    )
    return grams, products, centred


def _by_tiles(base: Tensor, h: Tensor, lora_B: Tensor, blocks: Blocks) -> Parts:
    """Blocks of any size."""
    means, centred = _means(base, blocks), _centred_h(h, blocks)
    return _grams(base, means, blocks), _products(base, lora_B, means, centred, blocks), centred


def _means(base: Tensor, blocks: Blocks) -> Tensor:
    """Column means [n, N] of each block of base [M, N]."""
    (M, N), chosen = base.shape, config("block_tiles", torch.float32)
    means = empty(base, (blocks.count, N), dtype=torch.float32)
    launch(
        _block_means_kernel,
        (blocks.count, triton.cdiv(N, chosen.block_n)),
        base,
        blocks.starts,
        blocks.weight,
        means,
        M,
        N,
        blocks.block_rows,
        *base.stride(),
        **chosen.constants,
    )
    return means


def _centred_h(h: Tensor, blocks: Blocks) -> Tensor:
    (parts, M, width), chosen = h.shape, config("block_tiles", torch.float32)
    length = triton.cdiv(blocks.block_rows, chosen.block_m) * chosen.block_m
    centred = empty(h, (blocks.count, length, width))
    launch(
        _block_h_kernel,
        (blocks.count, triton.cdiv(width, chosen.block_n)),
        h,
        blocks.starts,
        blocks.weight,
        centred,
        M,
        width,
        blocks.block_rows,
        length,
        blocks.scale,
        SPLITS=parts,
        BLOCK_M=chosen.block_m,
        BLOCK_R=chosen.block_n,
        **chosen.options,
    )
    return centred


def _grams(base: Tensor, means: Tensor, blocks: Blocks) -> Tensor:
    M, N = base.shape
    chosen = config("block_tiles", torch.float32)
    tiles = triton.cdiv(blocks.block_rows, chosen.block_m)
    parts, split_n = splits(blocks.count * tiles * tiles, N, chosen.block_n, chosen.slots)
    grams = empty(means, (blocks.count, parts, tiles * chosen.block_m, tiles * chosen.block_m))
    launch(
        _block_grams_kernel,
        (blocks.count * tiles * tiles, parts),
        base,
        blocks.starts,
        blocks.weight,
        means,
        grams,
        M,
        N,
        blocks.block_rows,
        *base.stride(),
        split_n,
        TILES=tiles,
        PRECISION=blocks.precision,
        **chosen.constants,
    )
    return grams


def _products(base: Tensor, lora_B: Tensor, means: Tensor, centred: Tensor, blocks: Blocks) -> Tensor:
    (M, N), R, block_r = base.shape, lora_B.shape[1], rank_tile(lora_B.shape[1], torch.float32)
    chosen, (_, length, width) = config("block_tiles", torch.float32), centred.shape
    tiles = triton.cdiv(blocks.block_rows, chosen.block_m) * triton.cdiv(R, block_r)
    parts, split_n = splits(blocks.count * tiles, N, chosen.block_n, chosen.slots)
    products = empty(centred, (blocks.count, parts, length, width))
    launch(
        _block_products_kernel,
        (blocks.count * tiles, parts),
        base,
        lora_B,
        centred,
        blocks.starts,
        blocks.weight,
        means,
        products,
        M,
        N,
        R,
        width,
        blocks.block_rows,
        *base.stride(),
        *lora_B.stride(),
        split_n,
        BLOCK_R=block_r,
        PRECISION=blocks.precision,
        **chosen.constants,
    )
    return products


def _sums(grams: Tensor, products: Tensor, centred: Tensor, blocks: Blocks, swapped: bool) -> Tensor:
    """(a, b, c, rows) of each block and tile."""
    (_, length, width), chosen = centred.shape, config("block_tiles", torch.float32)
    tiles = length // chosen.block_m
    sums = empty(centred, (blocks.count, tiles * tiles, 4), dtype=torch.float64)
    launch(
        _block_sums_kernel,
        (tiles * tiles, blocks.count),
        grams,
        products,
        centred,
        blocks.starts,
        blocks.weight,
        sums,
        blocks.base_rows,
        width,
        blocks.block_rows,
        grams.shape[1],
        products.shape[1],
        TILES=tiles,
        SWAPPED=swapped,
        BLOCK_M=chosen.block_m,
        BLOCK_R=rank_tile(width, torch.float32),
        **chosen.options,
    )
    return sums


def _total(sums: Tensor) -> Tensor:
    total, chosen = empty(sums, 4), config("block_tiles", torch.float32)
    launch(_block_total_kernel, (1,), sums, total, sums.numel() // 4, BLOCK_M=chosen.block_m)
    return total
