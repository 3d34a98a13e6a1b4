"""Puts the parts into one JSON, and prints the short table that a reader of the log needs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def load(parts: Path, name: str) -> dict[str, Any]:
    path = parts / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def kernel_lines(kernels: dict[str, Any]) -> list[str]:
    """Each case's median beside its floor."""
    lines = []
    for row in kernels.get("kernels", []):
        size = f"d {row['d']} r {row['r']} p {row['p']}"
        times = "  ".join(f"{name} {value['p50']:.3f}" for name, value in row["ms"].items())
        lines.append(f"{row['case']:<36} {size:<20} floor {row['floor_ms']:.3f}  {times}")
    return lines


def step_lines(steps: dict[str, Any]) -> list[str]:
    """Each step beside PEFT's with the same adapters frozen, and its memory beside PEFT's with nothing frozen."""
    rows = [row for row in steps.get("steps", []) if "ms" in row]
    time = {(row["size"], row["frozen"]): row["ms"]["p50"] for row in rows if row["provider"] == "peft"}
    memory = {row["size"]: row["peak_bytes"] for row in rows if (row["provider"], row["frozen"]) == ("peft", "nothing")}
    lines = [f"skipped: {steps['skipped']}"] if "skipped" in steps else []
    for row in steps.get("steps", []):
        name = f"step {row['size']:<5} {row['frozen']:<20} {row['provider']:<8}"
        if "error" in row:
            lines.append(f"{name} {row['error']}")
            continue
        own, other = row["ms"]["p50"], time.get((row["size"], row["frozen"]))
        ratio = f"  {other / own:.2f}x PEFT" if other else ""
        first = memory.get(row["size"])
        share = f"  {row['peak_bytes'] / first:.1%} of PEFT's unfrozen peak" if first else ""
        lines.append(f"{name} {own:8.1f} ms{ratio}  {row['peak_bytes'] / 2**30:6.2f} GiB{share}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = ("check", "kernels", "steps", "check-tuned", "tuned")
    check, kernels, steps, check_tuned, tuned = (load(options.parts, name) for name in names)
    sanitizer = (options.parts / "sanitizer.txt").read_text().splitlines()
    whole = {
        "dry_run": options.dry_run,
        "machine": kernels.get("machine", {}),
        "ceilings": kernels.get("ceilings", {}),
        "check": {"checked": check.get("checked"), "wrong": check.get("wrong"), "sanitizer": sanitizer},
        "kernels": kernels.get("kernels", []),
        "autotuned": {"wrong": check_tuned.get("wrong"), "kernels": tuned.get("kernels", [])},
        "steps": {key: value for key, value in steps.items() if key != "machine"},
    }
    options.out.write_text(json.dumps(whole, indent=1) + "\n")
    print("\n".join([*kernel_lines(kernels), *step_lines(steps)]))
    print("\n".join(["autotuned:", *kernel_lines(tuned)]))
    print(f"ceilings {whole['ceilings']}")
    print(f"checked {check.get('checked')}, wrong {len(check.get('wrong') or {})}; sanitizer: {'; '.join(sanitizer)}")
    if options.dry_run:
        print("dry run: no figure above means anything")


if __name__ == "__main__":
    main()
