"""`make evidence PART=...`: runs what is missing of an experiment, and prints its table."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from evidence import arms, flatness, oracle, table
from evidence.training import Task

ROOT = Path(__file__).parents[2]
FOLDER, FORKS = ROOT / "bench" / "results" / "evidence", ROOT / "build" / "evidence"

PARTS = {
    "oracle": oracle.run,
    "screening": partial(arms.run, "screening"),
    "windows": partial(arms.run, "windows"),
    "flatness": flatness.run,
}


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(prog="make evidence", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "table", "summary"))
    parser.add_argument("--seeds", default="0,1,2,3", help="seeds, separated by commas")
    parser.add_argument("--only", default="", help="units such as 0.mlp,3.attention, or arms; all by default")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the JSON files")
    given = parser.parse_args()
    if given.part in PARTS:
        given.folder.mkdir(parents=True, exist_ok=True)
        chosen = [one for one in given.only.split(",") if one]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        for line in PARTS[given.part](Task(), seeds, given.folder, FORKS, chosen):
            print(line, flush=True)
    print("\n".join(table.lines() if given.part == "table" else summary(given.folder)))


def summary(folder: Path) -> list[str]:
    """Return the tables of what was run."""
    lines = oracle.summary(folder)
    for part in ("screening", "windows"):
        lines += ["", f"{part}:", "", *arms.summary(part, folder)] if any(folder.glob(f"{part}-*.json")) else []
    if any(folder.glob("flatness-*.json")):
        lines += ["", "flatness:", "", *flatness.summary(folder)]
    return lines


if __name__ == "__main__":
    main()
