"""Prints a short table of the results, and indents the JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .results import PARTS, read, write


def cell(found: dict[str, Any]) -> str:
    """Return a median; in brackets the median of the same work in a CUDA graph, without processor time."""
    if "p50" not in found:
        return found["error"][:40]
    return f"{found['p50']:.3f}" + (f" ({found['device_p50']:.3f})" if "device_p50" in found else "")


def op_lines(part: dict[str, Any]) -> list[str]:
    """Return the median of each case, compared with its floor."""
    lines = []
    for row in part.get("rows", []):
        size = f"d {row['d']} r {row['r']} p {row['p']}"
        times = "  ".join(f"{name} {cell(found)}" for name, found in row["ms"].items())
        lines.append(f"{row['case']:<36} {size:<20} floor {row['floor_ms']:.3f}  {times}")
    return lines


def step_lines(part: dict[str, Any]) -> list[str]:
    """Return each step compared with PEFT: time with the same adapters frozen, memory with nothing frozen."""
    rows = [row for row in part.get("rows", []) if "ms" in row]
    time = {(row["size"], row["frozen"]): row["ms"]["p50"] for row in rows if row["provider"] == "peft"}
    unscored = {(row["size"], row["frozen"]): row["ms"]["p50"] for row in rows if row["provider"] == "safe"}
    memory = {row["size"]: row["peak_bytes"] for row in rows if (row["provider"], row["frozen"]) == ("peft", "nothing")}
    lines = []
    for row in part.get("rows", []):
        name = f"step {row['size']:<5} {row['frozen']:<20} {row['provider']:<20}"
        if "ms" not in row:
            lines.append(f"{name} {row['error']}")
            continue
        own, other = row["ms"]["p50"], time.get((row["size"], row["frozen"]))
        ratio = f"  {other / own:.2f}x PEFT" if other else ""
        if row["provider"] == "safe, scored" and (plain := unscored.get((row["size"], row["frozen"]))):
            ratio += f"  scoring {own / plain - 1:+.1%}"
        first = memory.get(row["size"])
        share = f"  {row['peak_bytes'] / first:.1%} of PEFT's unfrozen peak" if first else ""
        lines.append(f"{name} {own:8.1f} ms{ratio}  {row['peak_bytes'] / 2**30:6.2f} GiB{share}")
    return lines


def part_line(name: str, part: dict[str, Any]) -> str:
    """Return how a part ended. A part still marked as running was stopped together with the script."""
    status = "stopped with the script" if part["status"] == "running" else part["status"]
    counts = (f"{key} {part[key]}" for key in ("seconds", "checked", "left_out", "error") if part.get(key))
    return f"{name:<12} {'; '.join([status, *counts])}"


def main() -> None:
    whole = read(path := Path(sys.argv[1]))
    write(path, whole, indent=1)
    parts = whole["parts"]
    print("\n".join([*op_lines(parts["ops"]), *step_lines(parts["steps"])]))
    print("\n".join(["tuned:", *op_lines(parts["ops_tuned"])]))
    print(f"ceilings {parts['ops'].get('ceilings', 'not measured')}")
    for name in PARTS:
        print(part_line(name, parts[name]))
        for case, problems in parts[name].get("wrong", {}).items():
            print(f"  WRONG {case}: {'; '.join(problems)}")
    if whole["run"].get("dry_run"):
        print("dry run: no figure above means anything")


if __name__ == "__main__":
    main()
