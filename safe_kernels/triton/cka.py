"""The sums that score an adapter, from the rows of sampled blocks alone; see `safe_kernels.reference.cka_sums`.

They have launches of their own, which read the sampled rows once more (2 % of 8,192 rows are some MB, mostly still in
the cache). In the pass that applies the adapter they would share its tiles, but every program of that pass would be
compiled for the registers of the few that score, blocks would have to begin where its tiles do, and the fused form
(lora_linear) could not share them: there the stored output is scored with the roles swapped.

Features are centred before they are multiplied, and K and E are each summed from products in float32, so that an
adapter that is aligned with its layer keeps its digits; the sums a, b, c are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_kernels.reference.importance import check_blocks
from safe_kernels.triton.cka_kernels import (
    _block_grams_kernel,
    _block_means_kernel,
    _block_products_kernel,
    _block_sums_kernel,
    _block_total_kernel,
)
from safe_kernels.triton.configs import config, float32_precision, rank_tile, splits
from safe_kernels.triton.launch import ceil_div
from safe_kernels.triton.plans import empty, launch

MOST_BLOCKS = 65535
"""Programs that CUDA takes along a grid's second axis."""


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
    """Scores sampled blocks of rows.

    Args:
        base: [N, d_out], features without the adapter, or with it when `swapped`.
        h: [parts, N, padded r], whose sum times lora_B' times scaling is what the adapter adds.
        lora_B: [d_out, r].
        scaling: as in `lora`.
        block_starts: int64 [n].
        block_rows: rows in a block.
        row_weight: [N], zero where a row must not count, or None.
        swapped: whether `base` has the adapter's part in it.

    Returns:
        float64 [4] = (a, b, c, rows).

    Raises:
        ValueError: see `safe_kernels.reference.importance.check_blocks`.
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
        scale=-scaling if swapped else scaling,
        precision="ieee" if exact else float32_precision("tf32x3"),
    )
    base_means, h_means = _means(base[None], blocks), _means(h, blocks)
    grams = _grams(base, base_means, blocks)
    products = _products(base, h, lora_B, base_means, h_means, blocks)
    return _total(_sums(grams, products, h, h_means, blocks, swapped))


@dataclass(frozen=True)
class Blocks:
    """What every launch has to know about the blocks.

    Attributes:
        starts: int64 [n], contiguous.
        weight: [N] of any dtype, contiguous, zero where a row must not count, or None.
        block_rows: rows in a block, at most N.
        scale: what h is multiplied by.
        precision: of products.
    """

    starts: Tensor
    weight: Tensor | None
    block_rows: int
    scale: float
    precision: str

    @property
    def count(self) -> int:
        """How many there are."""
        return self.starts.shape[0]


def _means(features: Tensor, blocks: Blocks) -> Tensor:
    """Column means [n, d] of each block of features [parts, N, d], the sum of whose parts counts."""
    parts, rows, columns = features.shape
    chosen = config("block_means", torch.float32)
    means = empty(features, (blocks.count, columns), dtype=torch.float32)
    launch(
        _block_means_kernel,
        (blocks.count, ceil_div(columns, chosen.columns)),
        features,
        blocks.starts,
        blocks.weight,
        means,
        rows,
        columns,
        blocks.block_rows,
        *features.stride(),
        PARTS=parts,
        HAS_WEIGHT=blocks.weight is not None,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        **chosen.options,
    )
    return means


def _grams(base: Tensor, means: Tensor, blocks: Blocks) -> Tensor:
    rows, columns = base.shape
    chosen = config("block_grams", torch.float32)
    tiles = ceil_div(blocks.block_rows, chosen.rows)
    parts, split_columns = splits(blocks.count * tiles * tiles, columns, chosen.columns)
    grams = empty(means, (blocks.count, tiles * tiles, parts, chosen.rows, chosen.rows))
    launch(
        _block_grams_kernel,
        (blocks.count * tiles * tiles, parts),
        base,
        blocks.starts,
        blocks.weight,
        means,
        grams,
        rows,
        columns,
        blocks.block_rows,
        *base.stride(),
        split_columns,
        TILES=tiles,
        HAS_WEIGHT=blocks.weight is not None,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        PRECISION=blocks.precision,
        **chosen.options,
    )
    return grams


def _products(base: Tensor, h: Tensor, lora_B: Tensor, base_means: Tensor, h_means: Tensor, blocks: Blocks) -> Tensor:
    (rows, columns), rank, width = base.shape, lora_B.shape[1], rank_tile(lora_B.shape[1], torch.float32)
    chosen = config("block_products", torch.float32, rank)
    tiles = ceil_div(blocks.block_rows, chosen.rows) * ceil_div(rank, width)
    parts, split_columns = splits(blocks.count * tiles, columns, chosen.columns)
    length = ceil_div(blocks.block_rows, chosen.rows) * chosen.rows
    products = empty(h, (blocks.count, parts, length, h.shape[2]))
    launch(
        _block_products_kernel,
        (blocks.count * tiles, parts),
        base,
        h,
        lora_B,
        blocks.starts,
        blocks.weight,
        base_means,
        h_means,
        products,
        rows,
        columns,
        rank,
        h.shape[2],
        blocks.block_rows,
        *base.stride(),
        *lora_B.stride(),
        split_columns,
        blocks.scale,
        SPLITS=h.shape[0],
        HAS_WEIGHT=blocks.weight is not None,
        ROWS=chosen.rows,
        COLUMNS=chosen.columns,
        RANK=width,
        PRECISION=blocks.precision,
        **chosen.options,
    )
    return products


def _sums(grams: Tensor, products: Tensor, h: Tensor, h_means: Tensor, blocks: Blocks, swapped: bool) -> Tensor:
    """(a, b, c, rows) of each block and tile."""
    (splits_of_h, rows, width), (_, tiles, gram_parts, tile_rows, _) = h.shape, grams.shape
    sums = empty(h, (blocks.count, tiles, 4), dtype=torch.float64)
    launch(
        _block_sums_kernel,
        (tiles, blocks.count),
        grams,
        products,
        h,
        h_means,
        blocks.starts,
        blocks.weight,
        sums,
        rows,
        width,
        blocks.block_rows,
        blocks.scale,
        gram_parts,
        products.shape[1],
        TILES=ceil_div(blocks.block_rows, tile_rows),
        SPLITS=splits_of_h,
        HAS_WEIGHT=blocks.weight is not None,
        SWAPPED=swapped,
        ROWS=tile_rows,
        RANK=rank_tile(width, torch.float32),
        **config("block_sums", torch.float32).options,
    )
    return sums


def _total(sums: Tensor) -> Tensor:
    total = empty(sums, 4)
    launch(_block_total_kernel, (1,), sums, total, sums.numel() // 4, ROWS=config("block_sums", torch.float32).rows)
    return total
