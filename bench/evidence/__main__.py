"""`make evidence PART=oracle|table|summary`: runs what is missing of an experiment, and prints its table."""

from __future__ import annotations

import argparse
from pathlib import Path

from evidence import oracle, table
from evidence.training import Task

ROOT = Path(__file__).parents[2]
FOLDER, FORKS = ROOT / "bench" / "results" / "evidence", ROOT / "build" / "evidence"


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(prog="make evidence", description=__doc__)
    parser.add_argument("part", choices=("oracle", "table", "summary"))
    parser.add_argument("--seeds", default="0,1,2,3", help="seeds, separated by commas")
    parser.add_argument("--units", default="", help="units to freeze, such as 0.mlp,3.attention; all by default")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for the JSON files")
    given = parser.parse_args()
    if given.part == "oracle":
        given.folder.mkdir(parents=True, exist_ok=True)
        chosen = [unit for unit in given.units.split(",") if unit]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        for line in oracle.run(Task(), seeds, given.folder, FORKS, chosen):
            print(line, flush=True)
    print("\n".join(table.lines() if given.part == "table" else oracle.summary(given.folder)))


if __name__ == "__main__":
    main()
