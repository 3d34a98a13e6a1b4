"""Shapes and dtypes of norms."""

from __future__ import annotations

from itertools import chain, combinations


def subsets(*names: str) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(names, count) for count in range(len(names) + 1)))


CASES = [("rms", names) for names in subsets("x", "weight")]
