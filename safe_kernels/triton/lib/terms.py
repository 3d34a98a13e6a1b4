"""Products of a bfloat16 matrix and an adapter's float32 factor, on the matrix units for bfloat16.

A float32 number has 24 significant bits and a bfloat16 number 8, so three bfloat16 terms hold it::

    factor = high + middle + low      left factor' = left high' + (left middle' + left low')

Each term is cut off, not rounded: then no term overflows, and all terms have the number's sign. Bits below 2^-133, the
smallest positive bfloat16, are lost. Infinity and NaN are in the first term alone. Where `left` is infinite, a term
of 0 gives NaN. So the sum of the smaller products is separate, and its NaN counts as 0: the sum of the first products
is then infinity or NaN by itself, as in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _upper(number):
    """The sign, the exponent and the first 8 significant bits of a float32 number."""
    return (number.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _factor(narrow, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of a narrow matrix as the products here take it: its three terms, and the first one where it is finite."""
    if PRECISION == "terms":
        upper = _upper(narrow)
        rest = narrow - upper
        is_finite = rest == rest
        rest = tl.where(is_finite, rest, 0.0)
        middle = _upper(rest)
        # NaN's upper half may be that of infinity, so NaN is converted whole.
        high, finite = tl.where(is_finite, upper, narrow), tl.where(is_finite, upper, 0.0)
        return high.to(OPERAND), middle.to(OPERAND), (rest - middle).to(OPERAND), finite.to(OPERAND)
    else:
        one = narrow.to(OPERAND)
        return one, one, one, one


@triton.jit
def _no_sums(M: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr):
    """The sums [M, R] of first products, and [M, 2 R] of the others: two for each column."""
    small: tl.constexpr = 2 * R if PRECISION == "terms" else R
    return tl.zeros([M, R], tl.float32), tl.zeros([M, small], tl.float32)


@triton.jit
def _multiply(left, right, sums, PRECISION: tl.constexpr):
    """Adds ``left right`` to `sums`; `left` is a tile of a large matrix, `right` a narrow `_factor`."""
    acc, small = sums
    if PRECISION == "terms":
        middle_low = tl.reshape(tl.join(right[1], right[2]), [right[0].shape[0], 2 * right[0].shape[1]])
        small = tl.dot(left, middle_low, small)
        acc = tl.dot(left, right[0], acc)
    else:
        acc = tl.dot(left, right[0], acc, input_precision=PRECISION)
    return acc, small


@triton.jit
def _total(sums, PRECISION: tl.constexpr):
    """The sum of `_multiply`'s products."""
    acc, small = sums
    if PRECISION == "terms":
        middle, low = tl.split(tl.reshape(small, [acc.shape[0], acc.shape[1], 2]))
        small = middle + low
        # fma, because Triton would join `+` and a product into a chain, whose warps share one axis.
        acc = tl.fma(tl.where(small == small, small, 0.0), 1.0, acc)
    return acc


@triton.jit
def _multiply_narrow(left, right, acc, PRECISION: tl.constexpr):
    """Adds ``left right`` to `acc`; both are narrow factors. Products below 2^-21 of the whole are left out.

    The smaller products take only finite numbers, so that they are finite and one sum holds all.
    """
    if PRECISION == "terms":
        acc = tl.dot(left[3], right[2], acc)
        acc = tl.dot(left[1], right[1], acc)
        acc = tl.dot(left[2], right[3], acc)
        acc = tl.dot(left[3], right[1], acc)
        acc = tl.dot(left[1], right[3], acc)
        return tl.dot(left[0], right[0], acc)
    else:
        return tl.dot(left[0], right[0], acc, input_precision=PRECISION)
