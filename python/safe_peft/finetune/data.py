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


def read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Read columns of a local file.

    Args:
        path: a .csv, .tsv, .jsonl, .json or .parquet file.
        columns: the names to read.

    Returns:
        Lists of equal length by column name. Values of csv and tsv files are strings.

    Raises:
        ConfigError: The file is missing, empty, unreadable or lacks a column.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"{path} must end in one of {', '.join(FORMATS)}; convert it, or rename it if it has one of these formats."
        )
    if not path.is_file():
        raise ConfigError(f"{path} does not exist or is not a file.")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty; give a file with at least one row.")
    table = _load(path)
    missing = [column for column in columns if column not in table]
    if missing:
        raise ConfigError(f"{path} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(table)}.")
    return {column: table[column] for column in columns}


def _load(path: Path) -> dict[str, list[Any]]:
    kind = FORMATS[path.suffix]
    try:
        table = _load_quietly(path, kind)
    except ConfigError:
        raise
    except Exception as error:  # the libraries raise many kinds of errors
        reason = first_line(error.__cause__ or error)
        if any(text in reason for text in NO_ROWS):
            raise _no_rows(path) from None
        raise ConfigError(f"{path} cannot be read as {kind}: {reason}") from error
    if not any(table.values()):
        raise _no_rows(path)
    return table


def _no_rows(path: Path) -> ConfigError:
    return ConfigError(f"{path} has no rows; give a file with at least one.")


def _load_quietly(path: Path, kind: str) -> dict[str, list[Any]]:
    """Load a file through `datasets`, with a temporary cache, so that an edited file is read again."""
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


def _is_missing(value: Any) -> bool:
    is_nan = isinstance(value, float) and math.isnan(value)
    return value is None or is_nan or (isinstance(value, str) and not value.strip())


def _refuse_missing(path: str | Path, column: str, values: list[Any], what: str) -> None:
    rows = [i + 1 for i, value in enumerate(values) if _is_missing(value)]
    if rows:
        raise ConfigError(
            f"{path}, column {column!r}: {len(rows)} of {len(values)} rows have no {what} (the first is row "
            f"{rows[0]}); fill or remove them, or name another column."
        )


def read_texts(path: str | Path, column: str) -> list[str]:
    """Read a text column.

    Args:
        path: the file.
        column: its name.

    Raises:
        ConfigError: The column is missing, or a row has no text in it.
    """
    return _texts(path, column, read_columns(path, [column])[column])


def _texts(path: str | Path, column: str, values: list[Any]) -> list[str]:
    _refuse_missing(path, column, values, "text")
    for i, value in enumerate(values):
        if not isinstance(value, str):
            kind = type(value).__name__
            raise ConfigError(f"{path}, column {column!r}: row {i + 1} holds {kind}, not text; name another column.")
    return values


def read_labelled(path: str | Path, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """Read a text column and a label column.

    Args:
        path: the file.
        text_column: the text's name.
        label_column: the label's name; its values are strings, integers or booleans.

    Returns:
        The texts, and the labels as strings.

    Raises:
        ConfigError: A column is missing, or a row lacks text or label.
    """
    columns = read_columns(path, [text_column, label_column])
    _refuse_missing(path, label_column, columns[label_column], "label")
    labels = [_label_text(path, label_column, i, value) for i, value in enumerate(columns[label_column])]
    return _texts(path, text_column, columns[text_column]), labels


def _label_text(path: str | Path, column: str, index: int, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # a table with gaps turns integers into floats
        value = int(value)
    if isinstance(value, str | int):
        return str(value).strip()
    raise ConfigError(
        f"{path}, column {column!r}: row {index + 1} holds {value!r}; a class is a string or an "
        "integer, so name another column."
    )


def class_names(labels: Sequence[str]) -> list[str]:
    """Return the classes in a stable order: by value if all are integers, otherwise by name.

    Args:
        labels: one per row.

    Raises:
        ConfigError: There are fewer than two classes.

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
    """Turn labels into class indices.

    Args:
        path: the labels' file, for errors.
        labels: one per row.
        names: the classes.

    Raises:
        ConfigError: A label is not among the classes.

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
    """Tokenize texts.

    Args:
        tokenizer: the model's own.
        texts: one per row.
        labels: one class index per row, or None for language modelling. Then the tokens are the targets, and rows of a
            single token are skipped, since they have no target.
        max_length: texts are truncated to this many tokens.

    Returns:
        The tokenizer's output with `labels`, one dict per row.

    Raises:
        ConfigError: No row is left.
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
