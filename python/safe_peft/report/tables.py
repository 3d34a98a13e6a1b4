"""A report's tables, as plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..planning.plan import MemoryPlan, parts_cells, text_table
from .comparison import comparison
from .records import RunRecord

if TYPE_CHECKING:
    from .report import FreezeReport


def adapter_cells(report: FreezeReport) -> list[list[str]]:
    """Lay the adapters out as text: a header, then one row per adapter, ordered by layer.

    Args:
        report: the report.

    Example:
        >>> from safe_peft import FreezeReport
        >>> adapter_cells(FreezeReport("m", {}, 1, ()))[0][0]
        'layer'
    """
    frozen = {freezing.name: freezing for freezing in report.freezings}
    first, last = _first_and_last(report)
    rows = [["layer", "adapter", "parameters", "importance, first", "importance, last", "frozen after step"]]
    for row in report.rows():
        freezing = frozen.get(row.name)
        layer = str(row.layer) if row.layer >= 0 else ""
        importances = [_importance(first.get(row.name)), _importance(last.get(row.name))]
        rows.append([layer, row.label, f"{row.parameters:,}", *importances, str(freezing.step) if freezing else ""])
    return rows


def _first_and_last(report: FreezeReport) -> tuple[dict[str, float], dict[str, float]]:
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for scoring in report.scorings:
        for name, value in scoring.importance.items():
            first.setdefault(name, value)
            last[name] = value
    return first, last


def _importance(value: float | None) -> str:
    if value is None:
        return ""
    return "undefined" if math.isnan(value) else f"{value:.2e}"


def adapter_table(report: FreezeReport) -> str:
    """Return one line per adapter: parameters, first and last importance, the step it froze after.

    Args:
        report: the report.

    Example:
        >>> from safe_peft import FreezeReport
        >>> adapter_table(FreezeReport("m", {}, 1, ())).splitlines()[0]
        '0 of 0 adapters frozen in 1 steps'
    """
    title = f"{len(report.freezings)} of {len(report.adapters)} adapters frozen in {report.total_steps} steps"
    return text_table(adapter_cells(report), title, left=2)


def runs_table(runs: Sequence[RunRecord], title: str = "") -> str:
    """Return the measured runs side by side, one column per method.

    Args:
        runs: the runs.
        title: a heading.

    Example:
        >>> runs_table([], "runs").splitlines()[0]
        'runs'
    """
    return text_table(comparison(runs), title)


def plans_table(plans: Sequence[tuple[str, MemoryPlan]]) -> str:
    """Return where each byte of a step goes, stock PEFT and ours.

    Args:
        plans: with a heading each, such as "start".

    Example:
        >>> print(plans_table([]))
        kept by, MiB
        retained
    """
    return text_table(parts_cells(plans), f"where each byte goes: {plans[0][1].batch}" if plans else "")
