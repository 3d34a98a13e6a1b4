"""The figure of a report: importance of every adapter over time, the threshold, and the retained bytes per step."""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from ..planning.figure import new_figure
from .records import AdapterRow, mebibytes
from .tables import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .report import FreezeReport

# People with any colour vision can distinguish Okabe and Ito's palette from viridis; viridis contains no grey.
FREEZE, THRESHOLD, BAND, OTHER = "#D55E00", "#000000", "#0072B2", "#666666"
FROZEN: dict[str, Any] = {"facecolor": "#F2F2F2", "edgecolor": "#C4C4C4", "hatch": "////", "lw": 0}
SCORES = {
    "cka": "importance, 1 − CKA",
    "relative_norm": "importance, |sBA| / |W|",
    "gradient_sensitivity": "importance, gradient sensitivity",
    "velocity": "importance, change of √(1 − CKA) per step",
    "drift": "importance, |change of sBA| / |W|",
    "sensitivity": "importance, smoothed sensitivity",
    "progress": "importance, progress by Adam's moments",
    "realised": "importance, loss removed",
    "random": "random rank (control)",
}
LABELLED_ROWS = 60  # more adapters than this are labelled by layer


def draw(report: FreezeReport) -> Figure:
    """Draw a report as three panels over one step axis; the figure is not registered in pyplot.

    Example:
        >>> from safe_peft import FreezeReport
        >>> draw(FreezeReport("m", {}, 1, ())).get_axes()[0].get_title(loc="left")
        'no adapter was scored'
    """
    heat_height = min(11.0, max(3.0, 0.17 * len(report.adapters)))
    frozen, total = len(report.freezings), len(report.adapters)
    figure = new_figure(heat_height + 5.2, f"{report.model}: {frozen} of {total} adapters frozen")
    heat, threshold, retained = figure.subplots(3, 1, sharex=True, height_ratios=[heat_height, 2.4, 2.0])
    _draw_importance(report, figure, heat)
    _draw_threshold(report, threshold)
    _draw_retained(report, retained)
    retained.set_xlim(0, max(1, report.total_steps))
    retained.set_xlabel("optimizer step")
    return figure


def _score_label(report: FreezeReport) -> str:
    score = str(report.config.get("score", "importance"))
    return SCORES.get(score, score)


def _importances(report: FreezeReport, rows: list[AdapterRow]) -> np.ndarray[Any, Any]:
    """Return importance as [adapters, scoring steps], NaN where an adapter was not scored or already frozen."""
    values = np.full((len(rows), len(report.scorings)), np.nan)
    frozen = {freezing.name: freezing.step for freezing in report.freezings}
    for j, scoring in enumerate(report.scorings):
        for i, row in enumerate(rows):
            if scoring.step <= frozen.get(row.name, scoring.step):
                values[i, j] = scoring.importance.get(row.name, math.nan)
    return values


def _draw_importance(report: FreezeReport, figure: Figure, axes: Axes) -> None:
    """Draw the heat map: one row per adapter, the first layer at the bottom."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    rows = report.rows()
    if not report.scorings or not rows:
        axes.set_title("no adapter was scored", loc="left", fontsize=10)
        axes.set_yticks([])
        return
    values = _importances(report, rows)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-8, 1.0)
    if low == high:
        low, high = low / 2, high * 2
    edges = [0, *(scoring.step for scoring in report.scorings)]  # a cell ends at its scoring step
    colours = colormaps["viridis"].with_extremes(under=colormaps["viridis"](0.0))
    masked = np.ma.masked_invalid(np.where(values > 0, values, np.where(np.isnan(values), np.nan, low / 2)))
    axes.set_facecolor("white")
    mesh = axes.pcolormesh(
        edges, np.arange(len(rows) + 1), masked, cmap=colours, norm=LogNorm(low, high), rasterized=True
    )
    figure.colorbar(mesh, ax=axes, label=f"{_score_label(report)} (log)", pad=0.01, fraction=0.04, aspect=30)
    _mark_frozen(report, axes, rows)
    _label_rows(axes, rows)
    axes.set_title("importance of every adapter, first layer at the bottom", loc="left", fontsize=10)


def _mark_frozen(report: FreezeReport, axes: Axes, rows: list[AdapterRow]) -> None:
    """Hatch every row from its freeze event on, and mark that step."""
    steps = {freezing.name: freezing.step for freezing in report.freezings}
    frozen = [(i, steps[row.name]) for i, row in enumerate(rows) if row.name in steps]
    if not frozen:
        return
    for i, step in frozen:
        axes.fill_betweenx([i, i + 1], step, report.total_steps, **FROZEN)
    places = [i for i, _ in frozen]
    axes.vlines(
        [step for _, step in frozen], places, [i + 1 for i in places], color=FREEZE, lw=2.5, label="freezes here"
    )
    axes.fill_between([], [], [], label="frozen", **FROZEN)
    _legend(axes)


def _label_rows(axes: Axes, rows: list[AdapterRow]) -> None:
    """Label every adapter if they are few, otherwise every layer; thin lines separate the layers."""
    starts = [next(group)[0] for _, group in groupby(enumerate(rows), key=lambda item: item[1].layer)]
    for start in starts[1:]:
        axes.axhline(start, color="white", lw=1.2 if len(rows) <= LABELLED_ROWS else 0.6)
    if len(rows) <= LABELLED_ROWS:
        labels = [f"{row.layer}  {row.label}" if row.layer >= 0 else row.label for row in rows]
        axes.set_yticks(np.arange(len(rows)) + 0.5, labels, fontsize=7.5)
    else:
        ends = [*starts[1:], len(rows)]
        centres = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
        axes.set_yticks(centres, [f"layer {rows[start].layer}" for start in starts], fontsize=7.5)
        inside = [row.label for row in rows[: ends[0]]]
        axes.set_ylabel("in each layer, upwards: " + ", ".join(inside[:8]), fontsize=7.5)
    axes.tick_params(axis="y", length=0)


def _draw_threshold(report: FreezeReport, axes: Axes) -> None:
    """Draw the threshold over the distribution of the importance of live adapters."""
    axes.set_title("threshold, over the adapters that still train", loc="left", fontsize=10)
    axes.set_ylabel(f"{_score_label(report)}\n(log)", fontsize=9)
    values = _importances(report, report.rows())
    steps = [scoring.step for scoring in report.scorings]
    if np.any(values > 0):
        live = np.ma.masked_invalid(np.where(values > 0, values, np.nan))
        low, q1, median, q3, high = (_quantile(live, q) for q in (0.0, 0.25, 0.5, 0.75, 1.0))
        axes.fill_between(steps, low, high, color=BAND, alpha=0.15, lw=0, label="all")
        axes.fill_between(steps, q1, q3, color=BAND, alpha=0.35, lw=0, label="middle half")
        axes.plot(steps, median, color=BAND, lw=1.2, label="median")
        axes.set_yscale("log")
    known = [(scoring.step, scoring.threshold) for scoring in report.scorings if scoring.threshold is not None]
    known = [(step, value) for step, value in known if value > 0]
    known = known or [(freezing.step, freezing.threshold) for freezing in report.freezings if freezing.threshold]
    if known:
        axes.step(*zip(*known, strict=True), where="post", color=THRESHOLD, lw=1.6, label="threshold")
    marks = [(freezing.step, freezing.importance) for freezing in report.freezings if freezing.importance > 0]
    if marks:
        axes.plot(*zip(*marks, strict=True), ls="", marker="x", ms=4, color=FREEZE, label="freezes")
    _legend(axes)


def _quantile(values: np.ma.MaskedArray[Any, Any], share: float) -> list[float]:
    columns = (column.compressed() for column in values.T)
    return [float(np.quantile(column, share)) if column.size else math.nan for column in columns]


def _draw_retained(report: FreezeReport, axes: Axes) -> None:
    """Draw the bytes that a step retains, and other runs as broken lines."""
    axes.set_title("retained for backward by one step", loc="left", fontsize=10)
    axes.set_ylabel("MiB", fontsize=9)
    styles = {"stock": (OTHER, "--"), "random": ("#009E73", "-."), "bind": ("#CC79A7", ":")}
    drawn = set()
    for run in report.runs:
        if run.method in styles and run.method not in drawn and run.retained != report.retained:
            colour, line = styles[run.method]
            _steps(axes, report, run.retained, TITLES[run.method], color=colour, ls=line, lw=1.4)
            drawn.add(run.method)
    if report.retained:
        own = TITLES["safe"] if drawn else "this run"
        _steps(axes, report, report.retained, own, color=BAND, ls="-", lw=2.0)
    if report.retained or drawn:
        axes.set_ylim(bottom=0)
        _legend(axes)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=OTHER)


def _steps(axes: Axes, report: FreezeReport, retained: tuple[tuple[int, int], ...], label: str, **style: Any) -> None:
    if retained:
        steps, sizes = [step for step, _ in retained], [mebibytes(size) for _, size in retained]
        axes.step([*steps, report.total_steps], [*sizes, sizes[-1]], where="post", label=label, **style)


def _legend(axes: Axes) -> None:
    """Put the legend above the panel, so it covers no data."""
    if entries := len(axes.get_legend_handles_labels()[0]):
        place: Any = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
        axes.legend(ncols=entries, frameon=False, fontsize=8.5, columnspacing=1.2, handlelength=1.6, **place)
