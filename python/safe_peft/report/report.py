"""What a training did: which adapter was worth what, who was frozen when, and what it saved.

A `FreezeReport` is plain data with a JSON form; the tables, the picture and the page are views of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
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
    """The record of one training with freezing, and of the runs it is compared with.

    Args:
        model: what was trained, for people to read.
        config: the method's configuration (`SafeConfig.to_dict()`).
        total_steps: optimizer steps of the whole training.
        adapters: every adapter, in the model's order.
        scorings: in the order of their steps.
        freezings: in the order of their steps; an adapter freezes once.
        retained: pairs of (optimizer step, bytes retained for backward by a forward from that step on).
        runs: measured runs: this one first, then those it is compared with, if any.
        plans: where each byte of a step goes, stock PEFT against ours, at the "start" and at the "end".

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
    runs: tuple[RunRecord, ...] = field(default=())
    plans: tuple[tuple[str, MemoryPlan], ...] = ()

    def rows(self) -> list[AdapterRow]:
        """List the adapters by layer, each with a label that is short and still unambiguous within its layer.

        Returns:
            One row per adapter: its layer (the first number in its name, or -1), label, name and parameters.

        Example:
            >>> FreezeReport("m", {}, 1, (AdapterRecord("bert.layer.2.query", 8),)).rows()[0][:2]
            (2, 'query')
        """
        rows = [AdapterRow(*_place(adapter.name), adapter.name, adapter.parameters) for adapter in self.adapters]
        return sorted(rows, key=lambda row: row.layer)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values.

        Example:
            >>> FreezeReport("m", {}, 1, ()).to_dict()["format"]
            'safe_peft.report'
        """
        return {"format": FORMAT, "version": VERSION, **jsonio.encode(self)}

    @classmethod
    def from_dict(cls, data: Any) -> FreezeReport:
        """Read what `to_dict` wrote, and refuse anything else.

        Args:
            data: the JSON values.

        Raises:
            StateError: A part is missing, unknown, or of the wrong type.

        Example:
            >>> FreezeReport.from_dict(FreezeReport("m", {}, 1, ()).to_dict()).model
            'm'
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise StateError(f"this is no report: 'format' must be {FORMAT!r}; point to a report.json of safe_peft.")
        if data.get("version") != VERSION:
            raise StateError(
                f"report version {data.get('version')!r} is not {VERSION}; write it again with this version."
            )
        return jsonio.decode(cls, {key: data[key] for key in data if key not in ("format", "version")}, "report")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FreezeReport:
        """Read a `report.json`.

        Args:
            path: the file.

        Raises:
            StateError: It is missing, damaged, or not a report.

        Example:
            >>> FreezeReport.load("runs/demo/report.json")  # doctest: +SKIP
        """
        return cls.from_dict(jsonio.read_json(path))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, atomically.

        Args:
            path: the file to write or replace.

        Example:
            >>> report.save_json("runs/demo/report.json")  # doctest: +SKIP
        """
        jsonio.write_json(path, self.to_dict())

    def __str__(self) -> str:
        from .tables import adapter_table

        return adapter_table(self)

    def save_memory_png(self, path: str | os.PathLike[str]) -> bool:
        """Draw where each byte of a step goes, stock PEFT against ours, into a PNG file, atomically.

        Args:
            path: the file to write or replace.

        Returns:
            Whether there was a plan to draw.

        Example:
            >>> FreezeReport("m", {}, 1, ()).save_memory_png("memory.png")
            False
        """
        if not self.plans:
            return False
        from ..planning.figure import draw_plans, png_of

        jsonio.replace_file(path, png_of(draw_plans(self.plans)))
        return True

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Draw importance over time, the threshold and the retained bytes per step into a PNG file, atomically.

        Args:
            path: the file to write or replace.

        Example:
            >>> report.save_png("runs/demo/report.png")  # doctest: +SKIP
        """
        from ..planning.figure import png_of
        from .figure import draw

        jsonio.replace_file(path, png_of(draw(self)))

    def save_html(self, path: str | os.PathLike[str], *, picture: str | os.PathLike[str] | None = None) -> None:
        """Write one self-contained HTML page: the tables, the picture and the configuration.

        Args:
            path: the file to write or replace.
            picture: what `save_png` wrote, to save drawing it again.

        Example:
            >>> report.save_html("runs/demo/report.html")  # doctest: +SKIP
        """
        from .html import render

        text = render(self, None if picture is None else Path(picture).read_bytes())
        jsonio.replace_file(path, text.encode())


def _place(name: str) -> tuple[int, str]:
    """Split a layer's name at its first number: the layer's index, and what distinguishes it inside that layer."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and i + 1 < len(parts):
            return int(part), ".".join(parts[i + 1 :])
    return -1, name.removeprefix("base_model.model.")
