"""Reads the labelled text among the assets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .cache import fetch


class Example(NamedTuple):
    """A text and the number of its class."""

    text: str
    label: int


Split = tuple[list[Example], list[Example]]


def load_film_reviews(*, test_rows: int = 2_000, seed: int = 0) -> Split:
    """Return sentences of film reviews; the label is 1 if the mean rating is positive, and 0 if it is negative.

    Args:
        test_rows: the number of test sentences, of 10,566 in all.
        seed: seed of the shuffle; the same seed gives the same split on every machine.

    Returns:
        (train, test): 8,566 and 2,000 examples by default.

    Raises:
        AssetError: See `fetch`.
    """
    return _split(_read_rated(fetch("film-reviews") / "movieReviewSnippets_GroundTruth.txt"), test_rows, seed)


def load_tweets(*, test_rows: int = 1_000, seed: int = 0) -> Split:
    """Return tweets; the label is 1 if the mean rating is positive, and 0 if it is negative.

    Args:
        test_rows: the number of test tweets, of 4,196 in all.
        seed: of the shuffle.

    Returns:
        (train, test): 3,196 and 1,000 examples by default.

    Raises:
        AssetError: See `fetch`.
    """
    return _split(_read_rated(fetch("tweets") / "tweets_GroundTruth.txt"), test_rows, seed)


def load_reuters(name: str = "r8", *, labels: Sequence[str] | None = None) -> Split:
    """Return news by topic, in the published split.

    Args:
        name: "r8" or "r52", the number of classes.
        labels: keep only these classes and number them in this order; None keeps all, numbered alphabetically.

    Returns:
        (train, test): 5,485 and 2,189 examples for "r8", 6,532 and 2,568 for "r52".

    Raises:
        ValueError: A name in `labels` is not a class of this data set.
        AssetError: See `fetch`.
    """
    folder = fetch(f"reuters-{name}")
    train, test = _read_tab(folder / "train.tab"), _read_tab(folder / "test.tab")
    classes = sorted({label for label, _ in train})
    unknown = sorted(set(labels or ()) - set(classes))
    if unknown:
        raise ValueError(f"labels: reuters-{name} has no class {', '.join(unknown)}; it has {', '.join(classes)}.")
    number = {label: index for index, label in enumerate(labels or classes)}
    return _number(train, number), _number(test, number)


def _read_rated(path: Path) -> list[Example]:
    """Read lines `id TAB mean of 20 ratings, -4..4 TAB text`; ratings of 0 and repeated texts are left out."""
    examples: dict[str, Example] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        _, rating, text = line.rstrip("\r").split("\t") if line.strip() else ("", "0", "")
        if float(rating) != 0:
            examples.setdefault(text.strip(), Example(text.strip(), int(float(rating) > 0)))
    return list(examples.values())


def _split(examples: list[Example], test_rows: int, seed: int) -> Split:
    if not 0 < test_rows < len(examples):
        raise ValueError(f"test_rows must be between 1 and {len(examples) - 1}, got {test_rows}.")
    random.Random(seed).shuffle(examples)
    return examples[test_rows:], examples[:test_rows]


def _read_tab(path: Path) -> list[tuple[str, str]]:
    """Read lines `class TAB text`, after three lines of header."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[3:]:
        if line.strip():
            label, text = line.split("\t", 1)
            rows.append((label, text.strip()))
    return rows


def _number(rows: list[tuple[str, str]], number: dict[str, int]) -> list[Example]:
    return [Example(text, number[label]) for label, text in rows if label in number]
