"""`make evidence PART=...`: runs what is missing of an experiment, and prints its table."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from evidence import arms, oracle, table
from evidence.training import Task

ROOT = Path(__file__).parents[2]
FOLDER, FORKS = ROOT / "bench" / "results" / "evidence", ROOT / "build" / "evidence"


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(prog="make evidence", description=__doc__)
    parser.add_argument("part", choices=("oracle", "screening", "windows", "table", "summary"))
    parser.add_argument("--seeds", default="0,1,2,3", help="seeds, separated by commas")
    parser.add_argument("--only", default="", help="units such as 0.mlp,3.attention, or arms; all by default")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the JSON files")
    given = parser.parse_args()
    if given.part in ("oracle", "screening", "windows"):
        given.folder.mkdir(parents=True, exist_ok=True)
        chosen = [one for one in given.only.split(",") if one]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        runs = oracle.run if given.part == "oracle" else partial(arms.run, given.part)
        for line in runs(Task(), seeds, given.folder, FORKS, chosen):
            print(line, flush=True)
    print("\n".join(table.lines() if given.part == "table" else summary(given.folder)))


def summary(folder: Path) -> list[str]:
    """Return the tables of what was run."""
    lines = oracle.summary(folder)
    for part in ("screening", "windows"):
        lines += ["", f"{part}:", "", *arms.summary(part, folder)] if any(folder.glob(f"{part}-*.json")) else []
    return lines


if __name__ == "__main__":
    main()
