"""The kernels behind safe_kernels/triton/lib/cka.py: means, Gram matrices and sums of sampled blocks of rows."""

from __future__ import annotations

import triton
import triton.language as tl

from safe_kernels.triton.lib.skinny_matmul import _load_parts
from safe_kernels.triton.lib.terms import _factor, _multiply, _no_sums, _total


@triton.jit
def _block_rows(starts, weight, block, start_m, M, block_rows, BLOCK_M: tl.constexpr):
    """Rows start_m .. start_m + BLOCK_M - 1 of a block, and whether each of them counts."""
    within = start_m + tl.arange(0, BLOCK_M)
    offs_m = tl.load(starts + block) + within
    mask_m = (within < block_rows) & (offs_m >= 0) & (offs_m < M)
    if weight is not None:
        mask_m &= tl.load(weight + offs_m, mask=mask_m, other=0) != 0
    return offs_m, mask_m


@triton.jit
def _block_parts_kernel(
    base,  # [M, N]
    h,  # [SPLITS, M, width]
    lora_B,  # [N, R]
    starts,
    weight,
    grams,  # [blocks, parts, BLOCK_M, BLOCK_M]
    products,  # [blocks, parts, BLOCK_M, width]
    centred,  # [blocks, BLOCK_M, width]
    M,
    N,
    R,
    width,
    block_rows,
    stride_base_m,
    stride_base_n,
    stride_b_n,
    stride_b_r,
    split_n,
    scale,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    ADAPTER: tl.constexpr,  # `precision` of products with lora_B
):
    """A whole block and one part of the columns: one read replaces four kernels, which larger blocks need.

    The features are multiplied without centring. Centring the rows of K and V afterwards has the same effect. The
    adapter's part D = H B' of V = (X + D / 2) B is H (B' B) / 2.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    offs_m, mask_m = _block_rows(starts, weight, block, 0, M, block_rows, BLOCK_M)
    count = tl.maximum(tl.sum(mask_m.to(tl.float32), axis=0), 1.0)
    i, offs_r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    H = _load_parts(h, tl.where(mask_m, offs_m, M), offs_r, M, width, SPLITS)
    H = tl.where(mask_m[:, None] & (offs_r < width)[None, :], (H - (tl.sum(H, axis=0) / count)[None, :]) * scale, 0.0)
    narrow = i[:, None] * width + offs_r[None, :]
    if part == 0:
        tl.store(centred + tl.cast(block, tl.int64) * BLOCK_M * width + narrow, H, mask=(offs_r < width)[None, :])
    K = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    G = tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    sums = _no_sums(BLOCK_M, BLOCK_R, ADAPTER)
    end = tl.minimum(part * split_n + split_n, N)
    for start_n in range(part * split_n, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_n64, mask_n = offs_n.to(tl.int64), offs_n < end
        mask = mask_m[:, None] & mask_n[None, :]
        X = tl.load(base + offs_m[:, None] * stride_base_m + offs_n64[None, :] * stride_base_n, mask=mask, other=0.0)
        at = lora_B + offs_n64[:, None] * stride_b_n + offs_r.to(tl.int64)[None, :] * stride_b_r
        B = tl.load(at, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)
        K = tl.dot(X, tl.trans(X), K, input_precision=PRECISION)
        sums = _multiply(X.to(OPERAND), _factor(B, OPERAND, ADAPTER), sums, ADAPTER)
        G = tl.dot(tl.trans(B), B, G, input_precision=PRECISION)
    # Rows that do not count are zero, and stay so.
    K -= (tl.sum(K, axis=1) / count)[:, None]
    K -= (tl.sum(K, axis=0) / count)[None, :]
    K = tl.where(mask_m[:, None] & mask_m[None, :], K, 0.0)
    V = _total(sums, ADAPTER)
    V = tl.where(mask_m[:, None], V - (tl.sum(V, axis=0) / count)[None, :], 0.0)
    V = tl.dot(0.5 * H, G, V, input_precision=PRECISION)
    to = tl.cast(block, tl.int64) * tl.num_programs(1) + part
    tl.store(grams + to * BLOCK_M * BLOCK_M + i[:, None] * BLOCK_M + i[None, :], K)
    tl.store(products + to * BLOCK_M * width + narrow, V, mask=(offs_r < width)[None, :])


@triton.jit
def _block_means_kernel(
    base,  # [M, N]
    starts,
    weight,
    means,  # [blocks, N]
    M,
    N,
    block_rows,
    stride_base_m,
    stride_base_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    for start_m in range(0, block_rows, BLOCK_M):
        offs_m, mask_m = _block_rows(starts, weight, block, start_m, M, block_rows, BLOCK_M)
        at = base + offs_m[:, None] * stride_base_m + offs_n.to(tl.int64)[None, :] * stride_base_n
        tile = tl.load(at, mask=mask_m[:, None] & (offs_n < N)[None, :], other=0.0)
        acc += tl.sum(tile.to(tl.float32), axis=0)
        count += mask_m.to(tl.float32)
    mean = acc / tl.maximum(tl.sum(count, axis=0), 1.0)
    tl.store(means + block * N + offs_n, mean, mask=offs_n < N)


@triton.jit
def _block_h_kernel(
    h,  # [SPLITS, M, width]
    starts,
    weight,
    centred,  # [blocks, length, width]
    M,
    width,
    block_rows,
    length,
    scale,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Computes scaling * (h - mean of h)."""
    block = tl.program_id(0)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    for start_m in range(0, block_rows, BLOCK_M):
        offs_m, mask_m = _block_rows(starts, weight, block, start_m, M, block_rows, BLOCK_M)
        acc += tl.sum(_load_parts(h, tl.where(mask_m, offs_m, M), offs_r, M, width, SPLITS), axis=0)
        count += mask_m.to(tl.float32)
    mean = acc / tl.maximum(tl.sum(count, axis=0), 1.0)
    for start_m in range(0, length, BLOCK_M):
        offs_m, mask_m = _block_rows(starts, weight, block, start_m, M, block_rows, BLOCK_M)
        tile = _load_parts(h, tl.where(mask_m, offs_m, M), offs_r, M, width, SPLITS)
        tile = tl.where(mask_m[:, None], (tile - mean[None, :]) * scale, 0.0)
        at = (tl.cast(block, tl.int64) * length + start_m + tl.arange(0, BLOCK_M))[:, None] * width + offs_r[None, :]
        tl.store(centred + at, tile, mask=(offs_r < width)[None, :])


@triton.jit
def _centred(base, offs_m, mask_m, offs_n, N, mean, stride_base_m, stride_base_n):
    """A tile of the features minus their mean, zero where a row does not count."""
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    at = base + offs_m[:, None] * stride_base_m + offs_n.to(tl.int64)[None, :] * stride_base_n
    return tl.where(mask, tl.load(at, mask=mask, other=0.0).to(tl.float32) - mean[None, :], 0.0)


@triton.jit
def _narrow_tile(narrow, start_m, offs_r, width, BLOCK_M: tl.constexpr):
    """Rows start_m .. start_m + BLOCK_M - 1 of a matrix [any, width]."""
    at = (tl.cast(start_m, tl.int64) + tl.arange(0, BLOCK_M))[:, None] * width + offs_r[None, :]
    return tl.load(narrow + at, mask=(offs_r < width)[None, :], other=0.0)


@triton.jit
def _block_grams_kernel(
    base,  # [M, N]
    starts,
    weight,
    means,  # [blocks, N]
    grams,  # [blocks, splits, TILES * BLOCK_M, TILES * BLOCK_M]
    M,
    N,
    block_rows,
    stride_base_m,
    stride_base_n,
    split_n,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """K = X X' over one part of the columns; X is the centred features."""
    index, part = tl.program_id(0), tl.program_id(1)
    block, tile = index // (TILES * TILES), index % (TILES * TILES)
    start_i, start_j = tile // TILES * BLOCK_M, tile % TILES * BLOCK_M
    offs_i, mask_i = _block_rows(starts, weight, block, start_i, M, block_rows, BLOCK_M)
    offs_j, mask_j = _block_rows(starts, weight, block, start_j, M, block_rows, BLOCK_M)
    K = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    end = tl.minimum(part * split_n + split_n, N)
    for start_n in range(part * split_n, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mean = tl.load(means + block * N + offs_n, mask=offs_n < end, other=0.0)
        X_i = _centred(base, offs_i, mask_i, offs_n, end, mean, stride_base_m, stride_base_n)
        X_j = _centred(base, offs_j, mask_j, offs_n, end, mean, stride_base_m, stride_base_n)
        K = tl.dot(X_i, tl.trans(X_j), K, input_precision=PRECISION)
    i = tl.arange(0, BLOCK_M)
    at = (tl.cast(block, tl.int64) * tl.num_programs(1) + part) * TILES * BLOCK_M + start_i + i
    tl.store(grams + at[:, None] * TILES * BLOCK_M + (start_j + i)[None, :], K)


@triton.jit
def _block_products_kernel(
    base,  # [M, N]
    lora_B,  # [N, R]
    centred,  # [blocks, tiles * BLOCK_M, width]
    starts,
    weight,
    means,  # [blocks, N]
    products,  # [blocks, splits, tiles * BLOCK_M, width]
    M,
    N,
    R,
    width,
    block_rows,
    stride_base_m,
    stride_base_n,
    stride_b_n,
    stride_b_r,
    split_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """V = (X + D / 2) B over one part of the columns; D = H B' is the adapter's part, centred."""
    tiles, part = tl.cdiv(block_rows, BLOCK_M), tl.program_id(1)
    both = tiles * tl.cdiv(R, BLOCK_R)
    block, within = tl.program_id(0) // both, tl.program_id(0) % both
    tile, offs_r = within % tiles, within // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m, mask_m = _block_rows(starts, weight, block, tile * BLOCK_M, M, block_rows, BLOCK_M)
    V = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    end = tl.minimum(part * split_n + split_n, N)
    for start_n in range(part * split_n, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mean = tl.load(means + block * N + offs_n, mask=offs_n < end, other=0.0)
        X = _centred(base, offs_m, mask_m, offs_n, end, mean, stride_base_m, stride_base_n)
        B_columns = lora_B + tl.cast(offs_n, tl.int64)[:, None] * stride_b_n
        D = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_r in range(0, R, BLOCK_R):
            offs = start_r + tl.arange(0, BLOCK_R)
            mask = (offs_n < end)[:, None] & (offs < R)[None, :]
            B = tl.load(B_columns + tl.cast(offs, tl.int64)[None, :] * stride_b_r, mask=mask, other=0.0).to(tl.float32)
            H = _narrow_tile(centred, (block * tiles + tile) * BLOCK_M, offs, width, BLOCK_M)
            D = tl.dot(H, tl.trans(B), D, input_precision=PRECISION)
        mask = (offs_n < end)[:, None] & (offs_r < R)[None, :]
        B = tl.load(B_columns + tl.cast(offs_r, tl.int64)[None, :] * stride_b_r, mask=mask, other=0.0).to(tl.float32)
        V = tl.dot(X + 0.5 * D, B, V, input_precision=PRECISION)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = ((tl.cast(block, tl.int64) * tl.num_programs(1) + part) * tiles * BLOCK_M + i)[:, None] * width + offs_r[
        None, :
    ]
    tl.store(products + at, V, mask=(offs_r < width)[None, :])


@triton.jit
def _block_sums_kernel(
    grams,  # [blocks, gram_parts, TILES * BLOCK_M, TILES * BLOCK_M]
    products,  # [blocks, product_parts, TILES * BLOCK_M, width]
    centred,  # [blocks, TILES * BLOCK_M, width]
    starts,
    weight,
    sums,  # [blocks, tiles, tiles, 4]
    M,
    width,
    block_rows,
    gram_parts,
    product_parts,
    TILES: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """E = V H' + H V', and the inner products of K and E."""
    tile, block = tl.program_id(0), tl.program_id(1)
    start_i, start_j, i = tile // TILES * BLOCK_M, tile % TILES * BLOCK_M, tl.arange(0, BLOCK_M)
    _, mask_j = _block_rows(starts, weight, block, start_j, M, block_rows, BLOCK_M)
    E = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start_r in range(0, width, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        H_i = _narrow_tile(centred, block * TILES * BLOCK_M + start_i, offs_r, width, BLOCK_M)
        H_j = _narrow_tile(centred, block * TILES * BLOCK_M + start_j, offs_r, width, BLOCK_M)
        V_i = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        V_j = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for part in tl.range(0, product_parts, loop_unroll_factor=4):
            length = (block * product_parts + part) * TILES * BLOCK_M
            V_i += _narrow_tile(products, length + start_i, offs_r, width, BLOCK_M)
            V_j += _narrow_tile(products, length + start_j, offs_r, width, BLOCK_M)
        E = tl.dot(V_i, tl.trans(H_j), E, input_precision="ieee")
        E = tl.dot(H_i, tl.trans(V_j), E, input_precision="ieee")
    K = tl.zeros([BLOCK_M, BLOCK_M], tl.float64)
    for part in tl.range(0, gram_parts, loop_unroll_factor=4):  # several loads in flight
        at = (tl.cast(block, tl.int64) * gram_parts + part) * TILES * BLOCK_M + start_i + i
        K += tl.load(grams + at[:, None] * TILES * BLOCK_M + (start_j + i)[None, :])
    E = E.to(tl.float64)
    if SWAPPED:  # the features included the adapter, and E has the opposite sign
        K += E
        E = -E
    counted = tl.sum(tl.where(tile < TILES, mask_j.to(tl.int32), 0), axis=0)
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
    BLOCK_M: tl.constexpr,
):
    """The sum over all blocks and tiles, in a fixed order, by one program."""
    i, which = tl.arange(0, BLOCK_M), tl.arange(0, 4)
    acc = tl.zeros([4], tl.float64)
    for start_m in range(0, count, BLOCK_M):
        at = sums + (start_m + i)[:, None] * 4 + which[None, :]
        acc += tl.sum(tl.load(at, mask=(start_m + i < count)[:, None], other=0.0), axis=0)
    tl.store(total + which, acc)
