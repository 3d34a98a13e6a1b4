"""Draws the README's picture from the results of `make bench`: retained bytes of a step, stock PEFT and ours.

python bench/picture.py bench/results/cpu-memory.json docs/retained.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

STATES = {"nothing": "nothing frozen", "lower half": "lower half frozen"}
SHOWN = {"shape": "llama", "dtype": "fp32", "recompute": False}
COLOURS = {"stock PEFT": "#9a9a9a", "safe_kernels": "#2b6cb0"}


def sizes(results: dict[str, Any], p: float) -> dict[str, list[float]]:
    """Return the retained MiB by library, one number per state, for the Llama shape in fp32."""
    found = {}
    for row in results["benchmarks"]:
        params, facts = row["params"], row["extra_info"]
        if all(params.get(name) == value for name, value in (SHOWN | {"p": p}).items()):
            found[params["frozen"]] = (facts["stock_same_bytes"] / 2**20, facts["retained_bytes"] / 2**20)
    pairs = [found[state] for state in STATES]
    return {name: [pair[index] for pair in pairs] for index, name in enumerate(COLOURS)}


def draw(results: dict[str, Any], target: Path) -> None:
    """Draw one panel per dropout, with a pair of bars per state."""
    plt.rcParams |= {"svg.hashsalt": "safe_kernels", "font.family": "sans-serif", "font.size": 9}
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True, layout="constrained")
    for panel, p in zip(panels, (0.0, 0.1), strict=True):
        for place, (name, heights) in enumerate(sizes(results, p).items()):
            at = [index + 0.38 * place for index in range(len(STATES))]
            bars = panel.bar(at, heights, width=0.36, color=COLOURS[name], label=name)
            panel.bar_label(bars, fmt="%.0f", padding=2)
        panel.set_xticks([index + 0.19 for index in range(len(STATES))], list(STATES.values()))
        panel.set_title(f"LoRA dropout {p:g}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.15)
    panels[0].set_ylabel("MiB retained per step")
    panels[0].legend(frameon=False)
    figure.suptitle("Llama shape: 8 blocks, d 512, 1,024 tokens, fp32, LoRA r 16 on every linear layer", fontsize=9)
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    """Read the arguments, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text(encoding="utf-8")), arguments.target)


if __name__ == "__main__":
    main()
