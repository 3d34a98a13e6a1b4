"""The report of a training: importance of each adapter, freeze events, and saved bytes.

A `FreezeReport` is plain data with a JSON form; the tables, the figure and the page are views of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..files import jsonio
from ..planning.plan import MemoryPlan
from .records import AdapterRecord, AdapterRow, Freezing, RunRecord, Scoring

FORMAT = "safe_peft.report"
VERSION = 1


@dataclass(frozen=True)
class FreezeReport:
    """The record of one training with freezing, and of runs for comparison.

    Args:
        model: the model's name for readers.
        config: the method's configuration (`SafeConfig.to_dict()`).
        total_steps: optimizer steps of the whole training.
        adapters: every adapter, in the model's order.
        scorings: scoring steps, in order.
        freezings: one record per frozen adapter, in the order of steps.
        retained: pairs of (optimizer step, bytes retained for backward by a forward from that step on).
        runs: measured runs: this one first, then other runs for comparison, if any.
        plans: memory plans of a step, stock PEFT compared with the fast path, at the "start" and at the "end".

    Example:
        >>> report = FreezeReport("tiny", {}, 10, (AdapterRecord("layer.0.query", 64),))
        >>> FreezeReport.from_dict(report.to_dict()) == report
        True
    """

    model: str
    config: dict[str, Any]
    total_steps: int
    adapters: tuple[AdapterRecord, ...]
    scorings: tuple[Scoring, ...] = ()
    freezings: tuple[Freezing, ...] = ()
    retained: tuple[tuple[int, int], ...] = ()
    runs: tuple[RunRecord, ...] = ()
    plans: tuple[tuple[str, MemoryPlan], ...] = ()

    def rows(self) -> list[AdapterRow]:
        """List the adapters by layer: the first number in the name, or -1. Labels are unique within a layer.

        Example:
            >>> FreezeReport("m", {}, 1, (AdapterRecord("bert.layer.2.query", 8),)).rows()[0][:2]
            (2, 'query')
        """
        rows = [AdapterRow(*_place(adapter.name), adapter.name, adapter.parameters) for adapter in self.adapters]
        return sorted(rows, key=lambda row: row.layer)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; `from_dict` reads them."""
        return {"format": FORMAT, "version": VERSION, **jsonio.encode(self)}

    @classmethod
    def from_dict(cls, data: Any) -> FreezeReport:
        """Read the output of `to_dict`, and reject anything else.

        Args:
            data: the JSON values.

        Raises:
            StateError: A part is missing, unknown, or of the wrong type.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StateError(f"this is not a report: 'format' must be {FORMAT!r}; pass a report.json of safe_peft.")
        if data.get("version") != VERSION:
            raise StateError(
                f"report version: expected {VERSION}, got {data.get('version')!r}; write it again with this safe_peft."
            )
        return jsonio.decode(cls, {key: data[key] for key in data if key not in ("format", "version")}, "report")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezeReport:
        """Read a `report.json`.

        Args:
            path: the file.

        Raises:
            StateError: It is missing, damaged, or not a report.
        """
        return cls.from_dict(jsonio.read_json(path))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as a JSON file, atomically. An existing file is replaced."""
        jsonio.write_json(path, self.to_dict())

    def __str__(self) -> str:
        from .tables import adapter_table

        return adapter_table(self)

    def save_memory_png(self, path: str | os.PathLike[str]) -> bool:
        """Draw the memory plans into a PNG file, atomically, and return whether there was a plan to draw."""
        if not self.plans:
            return False
        from ..planning.figure import draw_plans, png_of

        jsonio.replace_file(path, png_of(draw_plans(self.plans)))
        return True

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Draw importance over time, the threshold and the retained bytes per step into a PNG file, atomically."""
        from ..planning.figure import png_of
        from .figure import draw

        jsonio.replace_file(path, png_of(draw(self)))

    def save_html(self, path: str | os.PathLike[str], *, picture: str | os.PathLike[str] | None = None) -> None:
        """Write one self-contained HTML page: the tables, the figure and the configuration.

        Args:
            path: the file to write or replace.
            picture: a file from `save_png`, so that the figure is not drawn again.
        """
        from .html import render

        text = render(self, None if picture is None else Path(picture).read_bytes())
        jsonio.replace_file(path, text.encode())


def _place(name: str) -> tuple[int, str]:
    """Split a layer's name at its first number into the layer's index and the rest of the name."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and i + 1 < len(parts):
            return int(part), ".".join(parts[i + 1 :])
    return -1, name.removeprefix("base_model.model.")
