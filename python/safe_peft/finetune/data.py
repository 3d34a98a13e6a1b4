"""Text and labels from local csv, jsonl and parquet files, and their tokenized rows.

Errors in a file are reported before a model is loaded, with the file, the column and the row.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, first_line, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")  # errors of datasets and pyarrow
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Read columns of a local file; values of csv and tsv files are strings."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"{path} must end in one of {', '.join(FORMATS)}; convert it, or rename it if it has one of these formats."
        )
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty; give a file with at least one row.")
    no_rows = ConfigError(f"{path} has no rows; give a file with at least one.")
    try:
        table = _load(path, FORMATS[path.suffix])
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors
        reason = first_line(error.__cause__ or error)
        if any(text in reason for text in NO_ROWS):
            raise no_rows from None
        raise ConfigError(f"{path} cannot be read as {FORMATS[path.suffix]}: {reason}") from error
    if not any(table.values()):
        raise no_rows
    missing = [column for column in columns if column not in table]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(table)}.")
    return table


def _load(path: Path, kind: str) -> dict[str, list[Any]]:
    """Load a file quietly through `datasets`, with a temporary cache, so that an edited file is read again."""
    require("datasets", "cli")
    import datasets

    options = _csv_options(path) if kind == "csv" else {}
    was_quiet, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset(kind, data_files={"data": str(path)}, split="data", cache_dir=cache, **options)
            return {name: list(rows[name]) for name in rows.column_names}
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not was_quiet:
            datasets.enable_progress_bars()


def _csv_options(path: Path) -> dict[str, Any]:
    """Read every column as text, without guessing numbers: "NA" or "None" may be a label."""
    import datasets

    separator = "\t" if path.suffix == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream, delimiter=separator)
        header, first = next(rows, []), next(rows, [])
    if len(first) > len(header):  # pandas would use the first field as index and shift the others
        raise ConfigError(
            f"{path}: the first row has {len(first)} fields, the header {len(header)}; put text that holds the "
            "separator in double quotes."
        )
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {"sep": separator, "keep_default_na": False, "encoding": "utf-8-sig", "features": features}


def _refuse_missing(path: str | Path, column: str, values: list[Any], what: str) -> None:
    def is_missing(value: Any) -> bool:
        is_nan = isinstance(value, float) and math.isnan(value)
        return value is None or is_nan or (isinstance(value, str) and not value.strip())

    rows = [i for i, value in enumerate(values, 1) if is_missing(value)]
    if rows:
        raise ConfigError(
            f"{path}, column {column!r}: {len(rows)} of {len(values)} rows have no {what} (the first is row "
            f"{rows[0]}); fill or remove them, or name another column."
        )


def read_texts(path: str | Path, column: str) -> list[str]:
    """Read a text column; every row must have text in it."""
    return _texts(path, column, _read_columns(path, [column])[column])


def _texts(path: str | Path, column: str, values: list[Any]) -> list[str]:
    _refuse_missing(path, column, values, "text")
    for i, value in enumerate(values, 1):
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ConfigError(f"{path}, column {column!r}: row {i} holds {kind}, not text; name another column.")
    return values


def read_labelled(path: str | Path, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Read a text column, and a label column of strings, integers or booleans as strings."""
    columns = _read_columns(path, [text_column, label_column])
    _refuse_missing(path, label_column, columns[label_column], "label")
    labels = []
    for i, value in enumerate(columns[label_column], 1):
        if isinstance(value, float) and value.is_integer():  # a table with gaps turns integers into floats
            value = int(value)
        if not isinstance(value, str | int):
            raise ConfigError(
                f"{path}, column {label_column!r}: row {i} holds {value!r}; a class is a string or an integer, so name "
                "another column."
            )
        labels.append(str(value).strip())
    return _texts(path, text_column, columns[text_column]), labels


def class_names(labels: Sequence[str]) -> list[str]:
    """Return the classes in a stable order: by value if all are integers, otherwise by name.

    Example:
        >>> class_names(["10", "9", "10"])
        ['9', '10']
    """
    found = set(labels)
    if len(found) < 2:
        raise ConfigError(f"the training labels hold one class only, {labels[0]!r}; a classifier needs at least two.")
    if all(name.lstrip("-").isdecimal() for name in found):
        return sorted(found, key=lambda name: (int(name), name))
    return sorted(found)


def class_indices(path: str | Path, labels: Sequence[str], names: Sequence[str]) -> list[int]:
    """Turn a file's labels into indices of the named classes.

    Example:
        >>> class_indices("eval.csv", ["b", "a"], ["a", "b"])
        [1, 0]
    """
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(labels) - index.keys())
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        raise ConfigError(
            f"{path} has labels that the training file lacks: {shown}; the classes are {', '.join(names)}."
        )
    return [index[label] for label in labels]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], labels: list[int] | None, max_length: int
) -> list[Row]:
    """Return the tokenizer's output with `labels`, one dict per row; texts are truncated to `max_length` tokens.

    Without class indices the tokens are the targets, and rows of a single token are skipped, since they have no target.
    """
    columns = tokenizer(texts, truncation=True, max_length=max_length)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if labels is None:
        rows = [row | {"labels": row["input_ids"]} for row in rows if len(row["input_ids"]) > 1]
    else:
        rows = [row | {"labels": label} for row, label in zip(rows, labels, strict=True)]
    if not rows:
        raise ConfigError("no row has two tokens or more, so there is nothing to predict; check --text-column.")
    return rows
