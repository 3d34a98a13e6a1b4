"""The oracle: what it costs to freeze one unit alone, and how each score ranks the units.

A unit is the attention or the MLP of one block. All trainings of a seed continue from the same state, with the same
batches and the same dropout. In each, one unit is frozen to the end. The price of a unit is the rise of the test cross
entropy, compared with the training in which nothing is frozen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from evidence.results import finished, standard_error, write
from evidence.tasks import Data, Task
from evidence.training import Training, forked
from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.freezing.scores import score_names

NOTHING = "nothing"
SCORING_STEPS = 3


def unit_of(adapter: str) -> str:
    """Return the unit of an adapter: the number of its block, and "attention" or "mlp"."""
    found = re.search(r"\.layers?\.(\d+)\.(\w+)", adapter)
    assert found is not None, adapter
    return f"{found[1]}.{'attention' if 'att' in found[2] else 'mlp'}"


def units(training: Training) -> dict[str, list[str]]:
    """Return the names of the adapters by unit, lowest first."""
    found: dict[str, list[str]] = defaultdict(list)
    for adapter in training.adapters:
        found[unit_of(adapter.name)].append(adapter.name)
    return dict(found)


def run(task: Task, seeds: Sequence[int], folder: Path, forks: Path, chosen: Sequence[str] = ()) -> Iterator[str]:
    """Run what is missing, and yield a line per finished run.

    Args:
        task: the sizes.
        seeds: the seeds.
        folder: for the JSON files.
        forks: for the states at the forks, which are computed again if they are missing.
        chosen: units to freeze; all if there are none.
    """
    data = Data(task)
    for seed in seeds:
        members = units(forked(task, data, seed, forks))
        for unit in (NOTHING, *(chosen or members)):
            path = folder / f"oracle-{seed}-{unit}.json"
            if path.exists():
                continue
            training = forked(task, data, seed, forks)
            training.freeze(members.get(unit, []))
            seconds = training.run(task.steps)
            write(path, {"seed": seed, "unit": unit, "seconds": seconds, **training.test()})
            yield f"{path.name} {path.read_text()}"
        for score in score_names():
            path = folder / f"scores-{seed}-{score}.json"
            if not path.exists():
                write(path, {"seed": seed, "score": score, "importance": importance(task, data, seed, forks, score)})
                yield path.name


def importance(task: Task, data: Data, seed: int, forks: Path, score: str) -> dict[str, float]:
    """Return a score's importance per adapter after the fork; the last of a few successive scoring steps."""
    training = forked(task, data, seed, forks)
    training.binding.detach()
    config = SafeConfig(score=score, threshold=0.0, warmup=task.steps, max_warmup=task.steps, freeze_end=task.steps,
                        score_interval=1, freeze_interval=task.steps, seed=seed)  # fmt: skip
    freezer = AdapterFreezer(training.model, training.optimizer, config, total_steps=task.steps, first_step=task.fork)
    training.run(task.fork + SCORING_STEPS, after=freezer.step)
    found = dict(freezer.ledger.importance)
    freezer.detach()
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; the numbers of each side differ."""
    ranks = [[sorted(side).index(value) for value in side] for side in (one, other)]
    mean = (len(one) - 1) / 2
    above = sum((a - mean) * (b - mean) for a, b in zip(*ranks, strict=True))
    return above / sum((a - mean) ** 2 for a in ranks[0])


def prices(folder: Path) -> dict[str, dict[int, float]]:
    """Return the price of each unit by seed, in nats of test cross entropy, from the files of finished runs."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for one in finished("oracle", folder):
        found[one["seed"]][one["unit"]] = one["cross_entropy"]
    result: dict[str, dict[int, float]] = defaultdict(dict)
    for seed, by_unit in found.items():
        for unit, value in by_unit.items():
            if NOTHING in by_unit and unit != NOTHING:
                result[unit][seed] = value - by_unit[NOTHING]
    return dict(result)


def summary(folder: Path) -> list[str]:
    """Return the lines of docs/evidence.md: the prices, and each score's rank correlation with them."""
    found = prices(folder)
    lines = ["| frozen alone | rise of the test cross entropy, nats | standard error | seeds |", "|---|---|---|---|"]
    for unit, by_seed in sorted(found.items()):
        values = list(by_seed.values())
        error = f"{standard_error(values):.4f}" if len(values) > 1 else ""
        lines.append(f"| block {unit.replace('.', ', ')} | {fmean(values):+.4f} | {error} | {len(values)} |")
    seeds = set.intersection(*(set(by_seed) for by_seed in found.values())) if found else set()
    if len(found) < 3 or not seeds:
        return lines
    lines += ["", "| score | Spearman's correlation with the price, by seed | mean |", "|---|---|---|"]
    for score, by_seed in sorted(_scores(folder).items()):
        known = sorted(seeds & by_seed.keys())
        each = [spearman([found[unit][s] for unit in found], [by_seed[s][unit] for unit in found]) for s in known]
        if each:
            lines.append(f"| {score} | {', '.join(f'{one:+.2f}' for one in each)} | {fmean(each):+.2f} |")
    return lines


def _scores(folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Return the summed importance of each unit by score and seed."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for one in finished("scores", folder):
        sums: dict[str, float] = defaultdict(float)
        for name, value in one["importance"].items():
            sums[unit_of(name)] += value
        found[one["score"]][one["seed"]] = sums
    return found
