"""Files and batches: every format gives the same rows, what is wrong with a file is said, batches follow the seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from safe_peft import ConfigError
from safe_peft.finetune import data

# Files


def csv(text: str) -> Callable[[Path], Path]:
    return lambda folder: _written(folder / "data.csv", text)


def jsonl(text: str) -> Callable[[Path], Path]:
    return lambda folder: _written(folder / "data.jsonl", text)


def parquet(**columns: list[Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pandas.DataFrame(columns).to_parquet(folder / "data.parquet")
        return folder / "data.parquet"

    return write


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "write",
    [
        csv('\ufefftext,label\n"a, b",x\n"NA",y\n'),
        jsonl('{"text": "a, b", "label": "x"}\n{"text": "NA", "label": "y"}\n'),
        parquet(text=["a, b", "NA"], label=["x", "y"]),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert data.read_labelled(write(tmp_path), "text", "label") == (["a, b", "NA"], ["x", "y"])


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (csv(""), "is empty"),
        (csv("text,label\n"), "has no rows"),
        (csv("sentence,label\na,1\n"), "no column 'text'; its columns are sentence, label"),
        (csv("text,label\na,1\n,2\n"), "column 'text': 1 of 2 rows have no text (the first is row 2)"),
        (csv("text,label\na,1\nb,\nc,\n"), "column 'label': 2 of 3 rows have no label (the first is row 2)"),
        (csv("text,label\nfine, really,1\n"), "the first row has 3 fields, the header 2"),
        (csv('text,label\n"a,1\n'), "cannot be read as csv"),
        (jsonl('{"text": "a", "label": 1}\n{"text"'), "cannot be read as json"),
        (jsonl('{"text": "a", "label": 1}\n{"text": null, "label": 1}\n'), "rows have no text"),
        (parquet(text=["a", "b"], label=[1.0, math.nan]), "rows have no label"),
        (parquet(text=["a", "b"], label=[0.5, 1.0]), "a class is a string or an integer"),
        (parquet(text=[1, 2], label=[0, 1]), "row 1 holds int, not text"),
        (parquet(text=[], label=[]), "has no rows"),
        (lambda folder: _written(folder / "data.parquet", "no"), "cannot be read as parquet"),
        (lambda folder: _written(folder / "data.txt", "no"), "must end in one of .csv"),
        (lambda folder: folder / "gone.csv", "does not exist"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, write: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        data.read_labelled(write(tmp_path), "text", "label")
    assert says in str(caught.value)
    assert "data." in str(caught.value) or "gone.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_classes_are_ordered_by_value_or_name_and_unknown_ones_refused() -> None:
    assert data.class_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert data.class_names(["b", "a", "10"]) == ["10", "a", "b"]
    with pytest.raises(ConfigError, match="one class only, 'a'"):
        data.class_names(["a", "a"])
    with pytest.raises(ConfigError, match="'c'; the classes are a, b"):
        data.class_indices("eval.csv", ["a", "c"], ["a", "b"])
