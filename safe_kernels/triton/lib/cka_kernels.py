"""The kernels behind safe_kernels/triton/lib/cka.py: means, Gram matrices and sums of sampled blocks of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from safe_kernels.triton.lib.skinny_matmul import _load_parts


@triton.jit
def _block_rows(starts, weight, block, first, rows, block_rows, HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr):
    """Rows first .. first + ROWS - 1 of a block, and which of them count."""
    within = first + tl.arange(0, ROWS)
    row = tl.load(starts + block) + within
    counts = (within < block_rows) & (row >= 0) & (row < rows)
    if HAS_WEIGHT:
        counts &= tl.load(weight + row, mask=counts, other=0) != 0
    return row, counts


@triton.jit
def _block_parts_kernel(
    base,  # [rows, columns]
    h,  # [SPLITS, rows, width]
    lora_B,  # [columns, rank]
    starts,
    weight,
    grams,  # [blocks, parts, ROWS, ROWS]
    products,  # [blocks, parts, ROWS, width]
    centred,  # [blocks, ROWS, width]
    rows,
    columns,
    rank,
    width,
    block_rows,
    base_row,
    base_column,
    b_column,
    b_rank,
    split_columns,
    scale,
    SPLITS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A whole block and one part of the columns: everything that four kernels make of larger blocks, in one reading."""
    block, part = tl.program_id(0), tl.program_id(1)
    row, counts = _block_rows(starts, weight, block, 0, rows, block_rows, HAS_WEIGHT, ROWS)
    count = tl.maximum(tl.sum(counts.to(tl.float32), axis=0), 1.0)
    i, r = tl.arange(0, ROWS), tl.arange(0, RANK)
    H = _load_parts(h, tl.where(counts, row, rows), r, rows, width, SPLITS)
    H = tl.where(counts[:, None] & (r < width)[None, :], (H - (tl.sum(H, axis=0) / count)[None, :]) * scale, 0.0)
    narrow = i[:, None] * width + r[None, :]
    if part == 0:
        tl.store(centred + tl.cast(block, tl.int64) * ROWS * width + narrow, H, mask=(r < width)[None, :])
    K = tl.zeros([ROWS, ROWS], tl.float32)
    V = tl.zeros([ROWS, RANK], tl.float32)
    end = tl.minimum(part * split_columns + split_columns, columns)
    for first in range(part * split_columns, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        long_column, column_inside = column.to(tl.int64), column < end
        inside = counts[:, None] & column_inside[None, :]
        X = tl.load(base + row[:, None] * base_row + long_column[None, :] * base_column, mask=inside, other=0.0)
        X = X.to(tl.float32)
        X = tl.where(inside, X - (tl.sum(X, axis=0) / count)[None, :], 0.0)
        at = lora_B + long_column[:, None] * b_column + r.to(tl.int64)[None, :] * b_rank
        B = tl.load(at, mask=column_inside[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        D = tl.dot(H, tl.trans(B), input_precision=PRECISION)
        V = tl.dot(X + 0.5 * D, B, V, input_precision=PRECISION)
        K = tl.dot(X, tl.trans(X), K, input_precision=PRECISION)
    to = tl.cast(block, tl.int64) * tl.num_programs(1) + part
    tl.store(grams + to * ROWS * ROWS + i[:, None] * ROWS + i[None, :], K)
    tl.store(products + to * ROWS * width + narrow, V, mask=(r < width)[None, :])


@triton.jit
def _block_means_kernel(
    base,  # [rows, columns]
    starts,
    weight,
    means,  # [blocks, columns]
    rows,
    columns,
    block_rows,
    base_row,
    base_column,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for first in range(0, block_rows, ROWS):
        row, counts = _block_rows(starts, weight, block, first, rows, block_rows, HAS_WEIGHT, ROWS)
        at = base + row[:, None] * base_row + column.to(tl.int64)[None, :] * base_column
        tile = tl.load(at, mask=counts[:, None] & (column < columns)[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=0)
        count += counts.to(tl.float32)
    mean = total / tl.maximum(tl.sum(count, axis=0), 1.0)
    tl.store(means + block * columns + column, mean, mask=column < columns)


@triton.jit
def _block_h_kernel(
    h,  # [SPLITS, rows, width]
    starts,
    weight,
    centred,  # [blocks, length, width]
    rows,
    width,
    block_rows,
    length,
    scale,
    SPLITS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Scaling * h less its mean."""
    block = tl.program_id(0)
    r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for first in range(0, block_rows, ROWS):
        row, counts = _block_rows(starts, weight, block, first, rows, block_rows, HAS_WEIGHT, ROWS)
        total += tl.sum(_load_parts(h, tl.where(counts, row, rows), r, rows, width, SPLITS), axis=0)
        count += counts.to(tl.float32)
    mean = total / tl.maximum(tl.sum(count, axis=0), 1.0)
    for first in range(0, length, ROWS):
        row, counts = _block_rows(starts, weight, block, first, rows, block_rows, HAS_WEIGHT, ROWS)
        tile = _load_parts(h, tl.where(counts, row, rows), r, rows, width, SPLITS)
        tile = tl.where(counts[:, None], (tile - mean[None, :]) * scale, 0.0)
        at = (tl.cast(block, tl.int64) * length + first + tl.arange(0, ROWS))[:, None] * width + r[None, :]
        tl.store(centred + at, tile, mask=(r < width)[None, :])


@triton.jit
def _centred(base, row, counts, column, columns, mean, base_row, base_column):
    """A tile of the features less their mean, zero where a row does not count."""
    mask = counts[:, None] & (column < columns)[None, :]
    at = base + row[:, None] * base_row + column.to(tl.int64)[None, :] * base_column
    return tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :], 0.0)


@triton.jit
def _narrow_tile(narrow, first, r, width, ROWS: tl.constexpr):
    """Rows first .. first + ROWS - 1 of a matrix [any, width]."""
    at = (tl.cast(first, tl.int64) + tl.arange(0, ROWS))[:, None] * width + r[None, :]
    return tl.load(narrow + at, mask=(r < width)[None, :], other=0.0)


@triton.jit
def _block_grams_kernel(
    base,  # [rows, columns]
    starts,
    weight,
    means,  # [blocks, columns]
    grams,  # [blocks, splits, TILES * ROWS, TILES * ROWS]
    rows,
    columns,
    block_rows,
    base_row,
    base_column,
    split_columns,
    TILES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K = X X' over one part of the columns, X being the centred features."""
    index, part = tl.program_id(0), tl.program_id(1)
    block, tile = index // (TILES * TILES), index % (TILES * TILES)
    first_i, first_j = tile // TILES * ROWS, tile % TILES * ROWS
    row_i, counts_i = _block_rows(starts, weight, block, first_i, rows, block_rows, HAS_WEIGHT, ROWS)
    row_j, counts_j = _block_rows(starts, weight, block, first_j, rows, block_rows, HAS_WEIGHT, ROWS)
    K = tl.zeros([ROWS, ROWS], tl.float32)
    end = tl.minimum(part * split_columns + split_columns, columns)
    for first in range(part * split_columns, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mean = tl.load(means + block * columns + column, mask=column < end, other=0.0)
        X_i = _centred(base, row_i, counts_i, column, end, mean, base_row, base_column)
        X_j = _centred(base, row_j, counts_j, column, end, mean, base_row, base_column)
        K = tl.dot(X_i, tl.trans(X_j), K, input_precision=PRECISION)
    i = tl.arange(0, ROWS)
    at = (tl.cast(block, tl.int64) * tl.num_programs(1) + part) * TILES * ROWS + first_i + i
    tl.store(grams + at[:, None] * TILES * ROWS + (first_j + i)[None, :], K)


@triton.jit
def _block_products_kernel(
    base,  # [rows, columns]
    lora_B,  # [columns, rank]
    centred,  # [blocks, tiles * ROWS, width]
    starts,
    weight,
    means,  # [blocks, columns]
    products,  # [blocks, splits, tiles * ROWS, width]
    rows,
    columns,
    rank,
    width,
    block_rows,
    base_row,
    base_column,
    b_column,
    b_rank,
    split_columns,
    HAS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """V = (X + D / 2) B over one part of the columns, D = H B' being what the adapter adds, centred."""
    tiles, part = tl.cdiv(block_rows, ROWS), tl.program_id(1)
    both = tiles * tl.cdiv(rank, RANK)
    block, within = tl.program_id(0) // both, tl.program_id(0) % both
    tile, r = within % tiles, within // tiles * RANK + tl.arange(0, RANK)
    row, counts = _block_rows(starts, weight, block, tile * ROWS, rows, block_rows, HAS_WEIGHT, ROWS)
    V = tl.zeros([ROWS, RANK], tl.float32)
    end = tl.minimum(part * split_columns + split_columns, columns)
    for first in range(part * split_columns, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mean = tl.load(means + block * columns + column, mask=column < end, other=0.0)
        X = _centred(base, row, counts, column, end, mean, base_row, base_column)
        B_columns = lora_B + tl.cast(column, tl.int64)[:, None] * b_column
        D = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first_r in range(0, rank, RANK):
            s = first_r + tl.arange(0, RANK)
            inside = (column < end)[:, None] & (s < rank)[None, :]
            B = tl.load(B_columns + tl.cast(s, tl.int64)[None, :] * b_rank, mask=inside, other=0.0).to(tl.float32)
            H = _narrow_tile(centred, (block * tiles + tile) * ROWS, s, width, ROWS)
            D = tl.dot(H, tl.trans(B), D, input_precision=PRECISION)
        inside = (column < end)[:, None] & (r < rank)[None, :]
        B = tl.load(B_columns + tl.cast(r, tl.int64)[None, :] * b_rank, mask=inside, other=0.0).to(tl.float32)
        V = tl.dot(X + 0.5 * D, B, V, input_precision=PRECISION)
    i = tile * ROWS + tl.arange(0, ROWS)
    at = ((tl.cast(block, tl.int64) * tl.num_programs(1) + part) * tiles * ROWS + i)[:, None] * width + r[None, :]
    tl.store(products + at, V, mask=(r < width)[None, :])


@triton.jit
def _block_sums_kernel(
    grams,  # [blocks, gram_parts, TILES * ROWS, TILES * ROWS]
    products,  # [blocks, product_parts, TILES * ROWS, width]
    centred,  # [blocks, TILES * ROWS, width]
    starts,
    weight,
    sums,  # [blocks, tiles, tiles, 4]
    rows,
    width,
    block_rows,
    gram_parts,
    product_parts,
    TILES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SWAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
):
    """E = V H' + H V', and the inner products of K and E."""
    tile, block = tl.program_id(0), tl.program_id(1)
    first_i, first_j, i = tile // TILES * ROWS, tile % TILES * ROWS, tl.arange(0, ROWS)
    _, counts_j = _block_rows(starts, weight, block, first_j, rows, block_rows, HAS_WEIGHT, ROWS)
    E = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, width, RANK):
        r = first + tl.arange(0, RANK)
        H_i = _narrow_tile(centred, block * TILES * ROWS + first_i, r, width, ROWS)
        H_j = _narrow_tile(centred, block * TILES * ROWS + first_j, r, width, ROWS)
        V_i = tl.zeros([ROWS, RANK], tl.float32)
        V_j = tl.zeros([ROWS, RANK], tl.float32)
        for part in tl.range(0, product_parts, loop_unroll_factor=4):
            length = (block * product_parts + part) * TILES * ROWS
            V_i += _narrow_tile(products, length + first_i, r, width, ROWS)
            V_j += _narrow_tile(products, length + first_j, r, width, ROWS)
        E = tl.dot(V_i, tl.trans(H_j), E, input_precision="ieee")
        E = tl.dot(H_i, tl.trans(V_j), E, input_precision="ieee")
    K = tl.zeros([ROWS, ROWS], tl.float64)
    for part in tl.range(0, gram_parts, loop_unroll_factor=4):  # several on their way at a time
        at = (tl.cast(block, tl.int64) * gram_parts + part) * TILES * ROWS + first_i + i
        K += tl.load(grams + at[:, None] * TILES * ROWS + (first_j + i)[None, :])
    E = E.to(tl.float64)
    if SWAPPED:  # the features were those with the adapter, and it was taken away
        K += E
        E = -E
    counted = tl.sum(tl.where(tile < TILES, counts_j.to(tl.int32), 0), axis=0)
    to = sums + (block * TILES * TILES + tile) * 4
    tl.store(to, tl.sum(tl.sum(K * K, axis=1), axis=0))
    tl.store(to + 1, tl.sum(tl.sum(K * E, axis=1), axis=0))
    tl.store(to + 2, tl.sum(tl.sum(E * E, axis=1), axis=0))
    tl.store(to + 3, counted.to(tl.float64))


@triton.jit
def _block_total_kernel(
    sums,  # [count, 4]
    total,  # [4]
    count,
    ROWS: tl.constexpr,
):
    """What all blocks and tiles add up to, in their order: one program."""
    i, which = tl.arange(0, ROWS), tl.arange(0, 4)
    found = tl.zeros([4], tl.float64)
    for first in range(0, count, ROWS):
        at = sums + (first + i)[:, None] * 4 + which[None, :]
        found += tl.sum(tl.load(at, mask=(first + i < count)[:, None], other=0.0), axis=0)
    tl.store(total + which, found)
