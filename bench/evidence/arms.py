"""Trainings that freeze by different scores, policies and windows: what each frees, and what it costs in quality.

All trainings of a seed use the same batches and the same dropout, so their differences are paired. The training in
which nothing is frozen is an arm of the oracle and of "flatness".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence.oracle import NOTHING
from evidence.results import finished, mean, missing, write
from evidence.tasks import Data, Task
from evidence.training import Training, forked
from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.finetune.measure import retained_bytes, step_flops

SCORES = ("cka", "velocity", "drift", "sensitivity", "progress", "realised", "random")
EARLY: dict[str, Any] = {"target_fraction": 0.875, "warmup": 0.15, "max_warmup": 0.15, "freeze_end": 0.3}
EARLY |= {"freeze_interval": 0.025, "score_interval": 0.025}
CHOICES: dict[str, dict[str, Any]] = {
    **{score: {"score": score} for score in SCORES},
    "prefix": {"policy": "prefix"},
    "random_sets": {"policy": "random_sets"},
    "autofreeze": {"policy": "autofreeze", "score": "gradient_sensitivity"},
    "paper": {"freeze_by": "adapters"},
    **{f"{score} recomputed": {"score": score, "recompute": "frozen"} for score in ("cka", "progress", "realised")},
    "random_sets recomputed": {"policy": "random_sets", "recompute": "frozen"},
}
"""Scores and policies. In those that are "recomputed", frozen blocks run again in backward."""
SCREENING = {arm: {**EARLY, **chosen} for arm, chosen in CHOICES.items()}
"""An early window, to an eighth of the bytes."""
WINDOWS: dict[str, dict[str, Any]] = {
    f"{begin:g} to {end:g}": {"warmup": begin, "max_warmup": min(round(1.5 * begin, 3), end), "freeze_end": end}
    for begin, end in ((0.2, 0.7), (0.2, 0.2), (0.3, 0.3), (0.4, 0.4), (0.15, 0.5), (0.1, 0.4), (0.1, 0.3), (0.1, 0.2))
}
"""The default options with other windows."""
CURVES: dict[str, dict[str, Any]] = {
    f"{arm} {target:g}": {**CHOICES[arm], "target_fraction": target}
    for arm in ("cka", "progress", "random_sets", "prefix", "cka recomputed", "random_sets recomputed")
    for target in (0.25, 0.5, 0.75, 0.875)
}
"""The default options with other scores, policies and shares of the bytes."""
PARTS = {"screening": SCREENING, "windows": WINDOWS, "curves": CURVES}
DEFAULTS = {"windows": "0.2 to 0.7", "curves": "cka 0.75"}
"""The arms that are the default options. "flatness" trains with these, too."""


def options(part: str, arm: str, seed: int) -> SafeConfig:
    """Return the options of an arm of a part."""
    return SafeConfig(**PARTS[part][arm], seed=seed)


def run(part: str, task: Task, seeds: Sequence[int], folder: Path, forks: Path, chosen: Sequence[str]) -> Iterator[str]:
    """Run what is missing of a part, and yield a line per finished run.

    Args:
        part: "screening", "windows" or "curves".
        task: the sizes.
        seeds: the seeds.
        folder: for the JSON files.
        forks: for the states at the forks.
        chosen: the arms; all if there are none.
    """
    data = Data(task)
    for seed, arm, path in missing(part, seeds, chosen or PARTS[part], folder):
        training = forked(task, data, seed, forks) if part == "screening" else Training(task, data, seed)
        write(path, {"seed": seed, "arm": arm, **freeze(training, options(part, arm, seed)), **training.test()})
        yield f"{path.name} {path.read_text()}"


def freeze(training: Training, config: SafeConfig) -> dict[str, Any]:
    """Train to the end with freezing. Costs are shares of those of the same training without freezing."""
    task, probe = training.task, training.data.batch(training.data.train[: training.task.batch_size])
    training.binding.detach()
    start = training.done
    freezer = AdapterFreezer(training.model, training.optimizer, config, total_steps=task.steps, first_step=start)

    def cost() -> tuple[int, int]:
        with freezer.suspended():
            return retained_bytes(training.model, probe), step_flops(training.model, probe)

    whole = now = cost()
    costs = [whole] * start  # of every optimizer step

    def after() -> None:
        nonlocal now
        costs.append(now)
        if freezer.step():
            now = cost()

    seconds = training.run(task.steps, after)
    frozen = list(freezer.frozen)
    freezer.detach(keep_frozen=True)
    return {
        "seconds": seconds,
        "frozen": frozen,
        "bytes_end": now[0] / whole[0],
        "bytes": fmean(one / whole[0] for one, _ in costs),
        "flops": fmean(one / whole[1] for _, one in costs),
        "curve": [round(one / whole[0], 4) for one, _ in costs],
    }


def paired(part: str, folder: Path, other: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the results of a part by arm, each with its "base": the training of the same seed with nothing frozen.

    `other` is the folder of the bases, if they have another number of steps.
    """
    flat, base = (list(finished("flatness", place)) for place in (folder, other or folder))
    runs = {(one["seed"], DEFAULTS[part]): one for one in flat if one["arm"] == "default" and part in DEFAULTS}
    runs |= {(one["seed"], one["arm"]): one for one in finished(part, folder)}
    bases = {one["seed"]: one for one in base if one["arm"] == NOTHING}
    bases |= {one["seed"]: one for one in finished("oracle", other or folder) if one["unit"] == NOTHING}
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in PARTS[part]}
    for (seed, arm), one in sorted(runs.items()):
        if seed in bases:
            found[arm].append(one | {"base": bases[seed]})
    return {arm: runs for arm, runs in found.items() if runs}


def summary(part: str, folder: Path, other: Path | None = None) -> list[str]:
    """Return the table of a part: costs, and the rise of the test cross entropy compared with nothing frozen."""
    lines = ["| arm | bytes, end | bytes, mean | FLOPs | rise of the test cross entropy, nats | accuracy | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for arm, runs in paired(part, folder, other).items():
        cells = [f"{fmean(one[name] for one in runs):.2f}" for name in ("bytes_end", "bytes", "flops")]
        cells.append(mean([one["cross_entropy"] - one["base"]["cross_entropy"] for one in runs], "+.4f"))
        cells.append(mean([100 * (one["accuracy"] - one["base"]["accuracy"]) for one in runs], "+.2f") + " points")
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(runs)} |")
    return lines
