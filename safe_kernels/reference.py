"""The formulas, once, in plain PyTorch.

Each op's function here is three things at the same time: the oracle that tests compare kernels with, the default
kernel for every device that has none of its own, and the fake kernel that `torch.compile` traces with
(they are registered under ``CompositeExplicitAutograd``, which covers meta tensors too).

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3. Importance 1 - CKA: Son et al. 2025 (arXiv 2412.03587), with
linear CKA of Kornblith et al. 2019 (arXiv 1905.00414). Philox4x32-10: Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype sums are made in: float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _multiply_words(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * constant``; in halves of 16 bits, since int64 cannot hold the product."""
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16) + (low >> 16)
    return (high >> 16) & _WORD, ((high << 16) | (low & 0xFFFF)) & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable with each other.
        key: two int64 tensors holding 32-bit words.

    Returns:
        Four int64 tensors with values in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_words(c0, 0xD2511F53)
        high1, low1 = _multiply_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_keep(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """Which elements of a [rows, columns] matrix dropout keeps.

    The bits depend on the element's row and column and on `rng_state` alone, so any kernel can make them again in
    backward, on any device, in any order: nothing is stored. Columns ``4 i .. 4 i + 3`` take the four words of one
    counter.

    Args:
        rows: number of rows.
        columns: number of columns.
        dropout_p: probability that an element is dropped, in steps of ``2**-24``.
        rng_state: int64 tensor [2] = (seed, offset).

    Returns:
        Bool tensor [rows, columns], True where the element is kept.
    """
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    group = torch.arange((columns + 3) // 4, device=device, dtype=torch.int64)[None, :]
    counter = (group + torch.zeros_like(row), row, offset & _WORD, (offset >> 32) & _WORD)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)
    return (words.flatten(1)[:, :columns] >> 8) >= round(dropout_p * 2**24)


def _dropout_factor(x: Tensor, dropout_p: float, rng_state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What dropout multiplies x [N, d] by, or None when nothing is dropped."""
    if dropout_p == 0.0 or rng_state is None:
        return None
    keep = dropout_keep(x.shape[0], x.shape[1], dropout_p, rng_state)
    return keep.to(dtype) * (0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p))


def _dropped(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if factor is None else x.to(dtype) * factor


def lora(
    x: Tensor,
    base: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    block_starts: Tensor | None = None,
    block_rows: int = 0,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out = base + scaling * (dropout(x) A') B'`` and the sums that score the adapter.

    Args:
        x: [..., d_in], the layer's input.
        base: [..., d_out], the base layer's output for x.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        scaling: lora_alpha / r, or / sqrt(r) for rsLoRA.
        dropout_p: probability that an element of x is dropped.
        rng_state: int64 [2] = (seed, offset); needed when ``dropout_p > 0``.
        block_starts: int64 [n], the first flattened row of each scored block; None scores nothing.
        block_rows: rows in a block.
        row_weight: [N], zero where a row is padding and must not be scored.

    Returns:
        out, shaped and typed like `base`, and float64 [4] = (a, b, c, rows), or [0] when nothing was scored.
    """
    dtype = compute_dtype(x, base, lora_A, lora_B)
    rows = x.reshape(-1, x.shape[-1])
    h = _dropped(rows, _dropout_factor(rows, dropout_p, rng_state, dtype), dtype) @ lora_A.to(dtype).t()
    delta = scaling * (h @ lora_B.to(dtype).t())
    out = (base.to(dtype) + delta.reshape(base.shape)).to(base.dtype)
    if block_starts is None:
        return out.contiguous(), x.new_empty(0, dtype=torch.float64)
    base_rows = base.reshape(-1, base.shape[-1])
    return out.contiguous(), cka_sums(base_rows, delta, block_starts, block_rows, row_weight)


def lora_backward(
    grad: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float,
    rng_state: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `lora` for x, lora_A and lora_B; that for base is `grad` itself.

    Args:
        grad: [..., d_out], gradient of the output.
        x: [..., d_in], the layer's input; None when only grad_x is wanted, which does not depend on it.
        lora_A: [r, d_in].
        lora_B: [d_out, r].
        scaling: as in `lora`.
        dropout_p: as in `lora`.
        rng_state: as in `lora`: the mask is made again, not kept.
        output_mask: which of (grad_x, grad_A, grad_B) are wanted.

    Returns:
        grad_x [..., d_in], grad_A [r, d_in], grad_B [d_out, r]; those not wanted have shape [0].
    """
    want_x, want_A, want_B = output_mask
    like_x = grad if x is None else x
    dtype = compute_dtype(grad, like_x, lora_A, lora_B)
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    grad_rows = scaling * grad.reshape(-1, grad.shape[-1]).to(dtype)
    shape = (*grad.shape[:-1], lora_A.shape[1])
    factor = _dropout_factor(grad.new_empty(shape).reshape(-1, shape[-1]), dropout_p, rng_state, dtype)
    grad_x, grad_A, grad_B = grad.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    grad_h = grad_rows @ B if want_x or want_A else None
    if grad_h is not None and want_x:
        grad_x = _dropped(grad_h @ A, factor, dtype).to(like_x.dtype).reshape(shape)
    if x is not None and (want_A or want_B):
        dropped = _dropped(x.reshape(-1, x.shape[-1]), factor, dtype)
        if grad_h is not None and want_A:
            grad_A = (grad_h.t() @ dropped).to(lora_A.dtype)
        if want_B:
            grad_B = (grad_rows.t() @ (dropped @ A.t())).to(lora_B.dtype)
    return grad_x, grad_A, grad_B


def cka_sums(
    base: Tensor, delta: Tensor, block_starts: Tensor, block_rows: int, row_weight: Tensor | None = None
) -> Tensor:
    """The sums from which 1 - CKA of a layer's features without and with its adapter is made.

    With X = base and Y = base + delta, centred over the rows of each block, K = Xc Xc' and E = Yc Yc' - K:
    a = |K|^2, b = <K, E>, c = |E|^2. They are added over blocks, so sums of several calls, micro-batches or processes
    may simply be added (minibatch CKA, Nguyen et al. 2021, arXiv 2010.15327).

    Args:
        base: [N, d_out], features without the adapter.
        delta: [N, d_out], what the adapter adds.
        block_starts: int64 [n], the first row of each block.
        block_rows: rows in a block; a block that runs past row N is cut there.
        row_weight: [N], zero where a row must not count.

    Returns:
        float64 [4] = (a, b, c, number of rows that counted).
    """
    sums = base.new_zeros(4, dtype=torch.float64)
    if base.shape[0] == 0 or block_starts.shape[0] == 0:
        return sums
    rows = block_starts[:, None] + torch.arange(min(block_rows, base.shape[0]), device=base.device)
    inside = (rows >= 0) & (rows < base.shape[0])
    rows = rows.clamp(0, base.shape[0] - 1)
    counts = inside if row_weight is None else inside & (row_weight[rows] != 0)
    weight = counts.to(torch.float64)[:, :, None]
    total = weight.sum(1, keepdim=True).clamp(min=1)

    def centred(features: Tensor) -> Tensor:
        block = features[rows].to(torch.float64).masked_fill(weight == 0, 0.0)
        return (block - block.sum(1, keepdim=True) / total) * weight

    X, D = centred(base), centred(delta)
    K, cross = X @ X.mT, D @ X.mT
    E = cross + cross.mT + D @ D.mT
    return torch.stack([(K * K).sum(), (K * E).sum(), (E * E).sum(), weight.sum()])


def one_minus_cka(sums: Tensor) -> float:
    """1 - CKA from the sums (a, b, c, rows), without the cancellation that subtracting from 1 would bring.

    CKA = (a + b) / sqrt(a (a + 2 b + c)) is the cosine between K and K + E, so its sine is at hand:
    sin^2 = (a c - b^2) / (a (a + 2 b + c)), and 1 - cos = sin^2 / (1 + cos).

    Args:
        sums: float64 [4], or [3]: (a, b, c[, rows]), as `cka_sums` makes them.

    Returns:
        A number in [0, 1]; exactly 0.0 for an adapter that changes nothing; nan when the features are constant, when no
        row was scored, or when a sum is not finite.
    """
    a, b, c = (float(value) for value in sums[:3])
    if not all(math.isfinite(value) for value in (a, b, c)) or a <= 0.0:
        return math.nan
    if c == 0.0:
        return 0.0
    # Ratios to a, since a * c of large features could overflow.
    b, c = b / a, c / a
    length = 1.0 + 2.0 * b + c
    if length <= 0.0:
        return math.nan
    sin2 = max(c - b * b, 0.0) / length
    return sin2 / (1.0 + (1.0 + b) / math.sqrt(length))
