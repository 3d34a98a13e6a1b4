"""`make evidence PART=...`: runs what is missing of an experiment, and prints its table."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from evidence import arms, flatness, oracle, table
from evidence.tasks import TASKS

ROOT = Path(__file__).parents[2]
FOLDER, FORKS = ROOT / "bench" / "results" / "evidence", ROOT / "build" / "evidence"

PARTS = {"oracle": oracle.run, "flatness": flatness.run, **{part: partial(arms.run, part) for part in arms.PARTS}}


def main() -> None:
    """Read the arguments, run, print."""
    parser = argparse.ArgumentParser(prog="make evidence", description=__doc__)
    parser.add_argument("part", choices=(*PARTS, "table", "summary", "picture"))
    parser.add_argument("--task", choices=tuple(TASKS), default="film", help="film by default")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps of a training; 160 by default")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows, in as many steps")
    parser.add_argument("--seeds", default="0,1,2,3", help="seeds, separated by commas")
    parser.add_argument("--only", default="", help="units such as 0.mlp,3.attention, or arms; all by default")
    parser.add_argument("--folder", type=Path, help="for the JSON files; bench/results/evidence/<task> by default")
    parser.add_argument("--base", type=Path, help="folder of the trainings with nothing frozen, if it is another one")
    given = parser.parse_args()
    sizes = {"steps": given.steps, "epochs": given.epochs}
    name = "-".join([given.task, *(f"{n}-{size}" for size, n in sizes.items() if n != getattr(TASKS["film"], size))])
    folder, task = given.folder or FOLDER / name, replace(TASKS[given.task], **sizes)
    if given.part in PARTS:
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [one for one in given.only.split(",") if one]
        seeds = [int(seed) for seed in given.seeds.split(",")]
        for line in PARTS[given.part](task, seeds, folder, FORKS / name, chosen):
            print(line, flush=True)
    if given.part == "picture":
        from evidence.picture import draw  # needs matplotlib, and the set-up of `make demo` has none

        draw(folder, ("windows", "curves"), ROOT / "docs" / "evidence.svg")
        return
    print("\n".join(table.lines() if given.part == "table" else summary(folder, given.base)))


def summary(folder: Path, base: Path | None = None) -> list[str]:
    """Return the tables of what was run; `base` is the folder of the trainings with nothing frozen."""
    lines = oracle.summary(folder)
    for part in arms.PARTS:
        found = arms.summary(part, folder, base)
        lines += ["", f"{part}:", "", *found] if len(found) > 2 else []
    if any(folder.glob("flatness-*.json")):
        lines += ["", "flatness:", "", *flatness.summary(folder)]
    return lines


if __name__ == "__main__":
    main()
