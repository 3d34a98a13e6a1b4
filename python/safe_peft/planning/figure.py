"""The picture of a memory plan: where each byte of a step goes, stock PEFT compared with the fast path."""

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

# People with any colour vision can distinguish Okabe and Ito's palette. Parts that only adapters keep are hatched.
PALETTE = "#0072B2 #56B4E9 #009E73 #999999 #CCCCCC #F0E442 #000000 #CC79A7 #D55E00 #E69F00"
COLOURS = dict(zip(PARTS, PALETTE.split(), strict=True))
MAX_LABELLED = 60  # with more blocks than this, their names are not drawn


def new_figure(height: float, title: str) -> Figure:
    """Return an empty figure of this height in inches on matplotlib's Agg canvas, not registered in pyplot."""
    require("matplotlib", "report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    return figure


def png_of(figure: Figure) -> bytes:
    """Return the content of a PNG file with a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def draw_plans(plans: Sequence[tuple[str, MemoryPlan]]) -> Figure:
    """Draw plans of one model: stacked bars of bytes by part, and the bytes by block of the last plan.

    Each plan has a heading, such as "start"; there is at least one plan.
    """
    name, plan = plans[-1]
    ratios = [1.2 + 0.8 * len(plans), min(7.0, 0.22 * len(plan.ours.by_block) + 1.2)]
    title = f"{plan.model}, {plan.batch}: {plan.ratio:.2f} of what stock PEFT retains"
    figure = new_figure(1.4 + sum(ratios), title)
    parts, by_block = figure.subplots(2, 1, height_ratios=ratios)
    _draw_parts(parts, plans)
    _draw_blocks(by_block, name, plan)
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
    if entries := len(axes.get_legend_handles_labels()[0]):
        place_of: Any = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}
        axes.legend(ncols=min(5, entries), frameon=False, fontsize=8.5, **place_of)


def _draw_blocks(axes: Axes, name: str, plan: MemoryPlan) -> None:
    rows = merged(plan.stock.by_block, plan.ours.by_block)
    places = np.arange(len(rows))
    stock, ours = (np.array([sizes[i] for sizes in rows.values()]) / MIB for i in range(2))
    axes.barh(places + 0.2, stock, height=0.4, color="#999999", label="stock")
    axes.barh(places - 0.2, ours, height=0.4, color="#0072B2", label="ours")
    if len(rows) <= MAX_LABELLED:
        axes.set_yticks(places, list(rows), fontsize=7.5)
    else:
        axes.set_ylabel("block, lowest first")
    heading = f"by block{', ' + name if name else ''}, lowest first at the bottom"
    axes.set_title(heading, loc="left", fontsize=10)
    axes.set_xlabel("MiB")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
