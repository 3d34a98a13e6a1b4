"""Random bits for dropout: Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
"""The smallest number that passes every test of the paper (BigCrush). The paper's default, 10, has a margin."""
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
COLUMNS = 8
"""Columns that share a counter: each takes 16 of its 128 bits."""
STEPS = 2**16
"""A probability of dropout is a multiple of ``1 / STEPS``."""
MASK_VERSION = 2
"""Changes with every change of the bits: a run that resumes with another version gets other masks. 1 had 24 bits an
element."""
_WORD = 0xFFFFFFFF


def _multiply_words(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of ``a * constant``, in halves of 16 bits, since int64 is too small for it."""
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16) + (low >> 16)
    return (high >> 16) & _WORD, ((high << 16) | (low & 0xFFFF)) & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return four random 32-bit words for each counter, by Philox4x32-7.

    Args:
        counter: four int64 tensors with 32-bit words, broadcastable with each other.
        key: two int64 tensors with 32-bit words.

    Returns:
        Four int64 tensors with values in ``[0, 2**32)``.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply_words(c0, MULTIPLIERS[0])
        high1, low1 = _multiply_words(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """Return how many of the `STEPS` values of an element's bits drop it.

    This is `dropout_p` times `STEPS`, rounded. Only 1 drops everything, because the elements that a smaller probability
    keeps carry the expectation.

    Args:
        dropout_p: probability that an element is dropped.

    Example:
        >>> dropout_threshold(0.1), dropout_threshold(1e-6), dropout_threshold(1 - 1e-6), dropout_threshold(1.0)
        (6554, 0, 65535, 65536)
    """
    return STEPS if dropout_p >= 1.0 else min(round(dropout_p * STEPS), STEPS - 1)


def dropout_scale(dropout_p: float) -> float:
    """Return the factor of elements that are kept: 1 / (the exact probability that an element is kept), or 0.

    The scale uses the rounded probability, so the expectation of dropout is its input for every `dropout_p`.

    Args:
        dropout_p: probability that an element is dropped.

    Example:
        >>> dropout_scale(0.5), dropout_scale(0.1), dropout_scale(1.0)
        (2.0, 1.11111..., 0.0)
    """
    kept = STEPS - dropout_threshold(dropout_p)
    return STEPS / kept if kept else 0.0


def dropout_keep(rows: int, columns: int, dropout_p: float, rng_state: Tensor) -> Tensor:
    """Return which elements of a [rows, columns] matrix dropout keeps.

    The bits depend only on the element's row and column and on `rng_state`. So any kernel can compute them again in
    backward, on any device and in any order, and nothing is stored. Columns ``8 i .. 8 i + 7`` use the four words of
    one counter, the lower half of a word before the upper one.

    Args:
        rows: number of rows.
        columns: number of columns.
        dropout_p: probability that an element is dropped, rounded to a multiple of ``2**-16``.
        rng_state: int64 tensor [2] = (seed, offset).

    Returns:
        Bool tensor [rows, columns], True where the element is kept.
    """
    if rng_state.is_meta:  # only the shape matters (compiling, planning): this saves a hundred operations per call
        return rng_state.new_empty(rows, columns, dtype=torch.bool)
    device = rng_state.device
    seed, offset = rng_state[0], rng_state[1]
    row = torch.arange(rows, device=device, dtype=torch.int64)[:, None]
    group = torch.arange(-(-columns // COLUMNS), device=device, dtype=torch.int64)[None, :]
    counter = (group + torch.zeros_like(row), row, offset & _WORD, (offset >> 32) & _WORD)
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)
    bits = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return bits.flatten(1)[:, :columns] >= dropout_threshold(dropout_p)
