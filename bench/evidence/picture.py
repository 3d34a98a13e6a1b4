"""Draws the picture of docs/evidence.md: what an arm frees, what it costs in quality, and when it freezes."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from evidence import arms
from evidence.results import standard_error

PANELS = {"bytes": "retained bytes, mean of the run", "flops": "FLOPs of the run"}


def draw(folder: Path, parts: tuple[str, ...], target: Path) -> None:
    """Draw the arms of some parts: the rise of the test cross entropy over bytes and over FLOPs, and bytes over steps.

    Args:
        folder: with the JSON files. Costs are shares of those with nothing frozen.
        parts: such as "windows" and "curves".
        target: the SVG file.
    """
    plt.rcParams |= {"svg.hashsalt": "safe_kernels", "font.family": "sans-serif", "font.size": 8}
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
    found = {arm: runs for part in parts for arm, runs in arms.paired(part, folder).items()}
    if len(parts) > 1:
        found.pop(arms.DEFAULTS["curves"], None)  # the default options are an arm of the windows, too
    for number, (arm, runs) in enumerate(found.items()):
        rises = [run["cross_entropy"] - run["base"]["cross_entropy"] for run in runs]
        error = standard_error(rises) if len(rises) > 1 else None
        style = {"color": f"C{number % 10}", "marker": "os^v"[number // 10 % 4]}
        for panel, name in zip(panels, PANELS, strict=False):
            at = fmean(run[name] for run in runs)
            panel.errorbar(at, fmean(rises), yerr=error, label=f"{arm} ({len(runs)})", linestyle="", **style)
        panels[2].plot([fmean(step) for step in zip(*(run["curve"] for run in runs), strict=True)], style["color"])
    for panel, name in zip(panels, PANELS.values(), strict=False):
        panel.axhline(0, color="#9a9a9a", linewidth=0.8)
        panel.set_xlabel(f"{name}, share of nothing frozen")
    panels[0].set_ylabel("rise of the test cross entropy, nats")
    panels[2].set(xlabel="optimizer step", ylabel="retained bytes of a step, share", ylim=(0, 1.05))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(target, metadata={"Date": None})
