"""Dropout's random bits inside a kernel, as defined in safe_kernels/reference/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl

from safe_kernels.reference.philox import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _keep(rng, offs_m, start_n, threshold, BLOCK_N: tl.constexpr):
    """True where dropout keeps element [offs_m, start_n + 0 .. BLOCK_N - 1]; `start_n` is a multiple of 4.

    Four neighbouring columns share one counter, so the generator runs once per four elements.
    """
    seed, offset = tl.load(rng), tl.load(rng + 1)
    group = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group[None, :], offs_m[:, None].to(tl.int32), low, high, n_rounds=_ROUNDS)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [offs_m.shape[0], BLOCK_N])
    return (words >> 8).to(tl.int32) >= threshold
