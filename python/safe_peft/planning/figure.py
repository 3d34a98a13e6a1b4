"""A memory plan's picture: where each byte of a step goes, stock PEFT against ours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import require
from .retained import MIB, PARTS, merged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .plan import MemoryPlan

# Okabe and Ito's palette keeps apart for every kind of colour vision; what adapters alone keep is hatched.
COLOURS = dict(
    zip(
        PARTS,
        ("#0072B2", "#56B4E9", "#009E73", "#999999", "#CCCCCC", "#F0E442", "#000000", "#CC79A7", "#D55E00", "#E69F00"),
        strict=True,
    )
)
STOCK, OURS = "#999999", "#0072B2"
MOST_BLOCKS = 60  # more are drawn without their names


def new_figure(height: float, title: str) -> Figure:
    """Return an empty figure on matplotlib's Agg canvas, known to no global state.

    Args:
        height: in inches; all are of one width.
        title: its heading.

    Example:
        >>> new_figure(3.0, "plan").get_size_inches().tolist()
        [11.0, 3.0]
    """
    require("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    return figure


def png_of(figure: Figure) -> bytes:
    """Return a figure as a PNG file's content.

    Args:
        figure: what `new_figure` returned, with something drawn.

    Example:
        >>> png_of(new_figure(3.0, "plan"))[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def draw_plans(plans: Sequence[tuple[str, MemoryPlan]]) -> Figure:
    """Draw plans of one model: stacked bars by what keeps the bytes, and bytes by block.

    Args:
        plans: with a heading each, such as "start"; at least one.

    Returns:
        A figure on matplotlib's Agg canvas, known to no global state.
    """
    plan = plans[-1][1]
    ratios = [1.2 + 0.8 * len(plans), min(7.0, 0.22 * len(plan.ours.by_block) + 1.2)]
    title = f"{plan.model}, {plan.batch}: {plan.ratio:.2f} of what stock PEFT retains"
    figure = new_figure(1.4 + sum(ratios), title)
    parts, by_block = figure.subplots(2, 1, height_ratios=ratios)
    _draw_parts(parts, plans)
    _draw_blocks(by_block, plans)
    return figure


def _draw_parts(axes: Axes, plans: Sequence[tuple[str, MemoryPlan]]) -> None:
    sides = [
        (f"{who}, {name}" if name else who, s) for name, p in plans for who, s in (("stock", p.stock), ("ours", p.ours))
    ]
    labels = [label for label, _ in sides]
    left = np.zeros(len(sides))
    for part in PARTS:
        sizes = np.array([side.by_part.get(part, 0) for _, side in sides]) / MIB
        if sizes.any():
            hatch: dict[str, Any] = {"hatch": "////"} if part.startswith("LoRA") else {}
            axes.barh(labels, sizes, left=left, color=COLOURS[part], edgecolor="white", label=part, **hatch)
            left += sizes
    for place, size in enumerate(left):
        axes.text(size, place, f" {size:,.1f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlabel("MiB retained for backward by one step")
    entries = len(axes.get_legend_handles_labels()[0])
    if entries:
        place_of: Any = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
        axes.legend(ncols=min(5, entries), frameon=False, fontsize=8.5, **place_of)


def _draw_blocks(axes: Axes, plans: Sequence[tuple[str, MemoryPlan]]) -> None:
    plan = plans[-1][1]
    rows = merged(plan.stock.by_block, plan.ours.by_block)
    places = np.arange(len(rows))
    stock, ours = (np.array([sizes[i] for sizes in rows.values()]) / MIB for i in range(2))
    axes.barh(places + 0.2, stock, height=0.4, color=STOCK, label="stock")
    axes.barh(places - 0.2, ours, height=0.4, color=OURS, label="ours")
    if len(rows) <= MOST_BLOCKS:
        axes.set_yticks(places, list(rows), fontsize=7.5)
    else:
        axes.set_ylabel("block, lowest first")
    axes.set_title(
        f"by block{', ' + plans[-1][0] if plans[-1][0] else ''}, lowest first at the bottom", loc="left", fontsize=10
    )
    axes.set_xlabel("MiB")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
