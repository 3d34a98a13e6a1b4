"""Dropout's bits inside a kernel: the rule stands in safe_kernels/reference/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl

from safe_kernels.reference.philox import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _keep(rng, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """True where dropout keeps element [row, first_column + 0 .. COLUMNS - 1]; `first_column` is a multiple of 4.

    Four neighbouring columns share one counter, so a quarter of the elements' number of generators runs.
    """
    seed, offset = tl.load(rng), tl.load(rng + 1)
    group = first_column // 4 + tl.arange(0, COLUMNS // 4)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group[None, :], rows[:, None].to(tl.int32), low, high, n_rounds=_ROUNDS)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [rows.shape[0], COLUMNS])
    return (words >> 8).to(tl.int32) >= threshold
