"""Dropout's random bits inside a kernel, as defined in safe_kernels/reference/philox.py."""

from __future__ import annotations

import triton
import triton.language as tl

from safe_kernels.reference.philox import COLUMNS, KEY_STEPS, MULTIPLIERS, ROUNDS

_ROUNDS, _COLUMNS = tl.constexpr(ROUNDS), tl.constexpr(COLUMNS)
_MULTIPLIER0, _MULTIPLIER1 = map(tl.constexpr, MULTIPLIERS)
_KEY_STEP0, _KEY_STEP1 = map(tl.constexpr, KEY_STEPS)


@triton.jit
def _halves(number):
    """The high and the low 32 bits of a 64-bit number."""
    number = number.to(tl.uint64)
    return (number >> 32).to(tl.uint32), number.to(tl.uint32)


@triton.jit
def _rng_words(rng):
    """The two words of the key (seed) and the two upper words of the counter (offset), read once per program."""
    k1, k0 = _halves(tl.load(rng))
    c3, c2 = _halves(tl.load(rng + 1))
    return k0, k1, c2, c3


@triton.jit
def _keep(words, offs_m, start_n, threshold, BLOCK_N: tl.constexpr):
    """True where dropout keeps element [offs_m, start_n + 0 .. BLOCK_N - 1]; `start_n` is a multiple of 8.

    Eight neighbouring columns share one counter, so the generator runs once per eight elements. The counter's words
    have the shapes [1, groups], [rows, 1] and two scalars; they are broadcast as late as possible, so that the first
    rounds work on whole tiles as little as possible. Both halves of a product come from one 64-bit multiplication.
    """
    k0, k1, c2, c3 = words
    c0 = (tl.arange(0, BLOCK_N // _COLUMNS) + start_n // _COLUMNS).to(tl.uint32)[None, :]
    c1 = offs_m.to(tl.uint32)[:, None]
    for _ in tl.static_range(_ROUNDS):
        high0, low0 = _halves(c0.to(tl.uint64) * _MULTIPLIER0)
        high1, low1 = _halves(c2.to(tl.uint64) * _MULTIPLIER1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEP0, k1 + _KEY_STEP1
    # A column's 16 bits are moved up, not down: the upper half of a word then needs no shift.
    bound = (tl.cast(threshold, tl.uint32) << 16) - 1
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.join((words << 16) > bound, words > bound), [offs_m.shape[0], BLOCK_N])
