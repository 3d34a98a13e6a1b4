"""The schedule of scoring steps and freeze events, as pure functions of the step.

Steps count finished optimizer steps, so the first is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import ConfigError
from .config import POINTS, Point, SafeConfig, check_int


@dataclass(frozen=True)
class Schedule:
    """The schedule of a `SafeConfig`, all in optimizer steps."""

    warmup: int
    max_warmup: int
    freeze_end: int
    freeze_interval: int
    score_interval: int
    total_steps: int | None = None


def resolve(config: SafeConfig, total_steps: int | None = None) -> Schedule:
    """Turn shares of the training into steps; without `total_steps`, those of `config.total_steps`.

    Example:
        >>> resolve(SafeConfig(), total_steps=1000).freeze_end
        700
    """
    total = config.total_steps if total_steps is None else total_steps
    total = None if total is None else check_int("total_steps", total, least=1)
    points = {name: _steps(name, getattr(config, name), total) for name in POINTS}
    for earlier, later in (("warmup", "max_warmup"), ("max_warmup", "freeze_end")):
        if points[earlier] > points[later]:
            raise ConfigError(
                f"{later}: expected at least {earlier} ({getattr(config, earlier)!r}: step {points[earlier]}), got "
                f"{getattr(config, later)!r} (step {points[later]}); raise {later} or lower {earlier}."
            )
    points |= {name: max(1, points[name]) for name in ("freeze_interval", "score_interval")}
    return Schedule(**points, total_steps=total)


def _steps(name: str, point: Point, total: int | None) -> int:
    if isinstance(point, int):
        return point
    if total is None:
        raise ConfigError(
            f"total_steps: needed because {name}={point!r} is a share of the training; pass total_steps=... (optimizer "
            f"steps of the whole training), or pass {name} as an int (steps)."
        )
    return math.floor(point * total + 0.5)


def is_scoring_step(schedule: Schedule, step: int) -> bool:
    """Whether importance is measured in this step: at every `score_interval` and at `freeze_end`."""
    return step <= schedule.freeze_end and (step % schedule.score_interval == 0 or step == schedule.freeze_end)


def is_freezing_step(schedule: Schedule, warmup_end: int | None, step: int) -> bool:
    """Whether adapters may freeze after this step: at every `freeze_interval` after warm-up and at `freeze_end`."""
    if warmup_end is None or not warmup_end <= step <= schedule.freeze_end:
        return False
    return (step - warmup_end) % schedule.freeze_interval == 0 or step == schedule.freeze_end


def is_stable(before: Mapping[str, float], now: Mapping[str, float], change: float) -> bool:
    """Whether no importance changed by more than the share `change` of itself between two scoring steps.

    Values that are not finite are ignored. Without finite values, importance is not stable.
    """
    both = [(before[name], now[name]) for name in now if name in before]
    known = [(old, new) for old, new in both if math.isfinite(old) and math.isfinite(new)]
    return bool(known) and all(abs(new - old) <= change * abs(old) for old, new in known)


def choose(
    config: SafeConfig, importance: Mapping[str, float], *, adapters: int, frozen: int, share: float
) -> tuple[list[str], float | None]:
    """Choose the adapters to freeze now by the curve, least important first, and return its threshold too.

    With a fraction, which is of the number of all `adapters`, the threshold is the highest chosen importance, or None.

    Example:
        >>> importance = {"a": 0.3, "b": 0.1, "c": 0.2}
        >>> choose(SafeConfig(target_fraction=0.5), importance, adapters=4, frozen=0, share=1.0)
        (['b', 'c'], 0.2)
        >>> choose(SafeConfig(threshold=0.4), importance, adapters=4, frozen=0, share=0.5)
        (['b', 'c'], 0.2)
    """
    ranked = rank(config, importance)
    if config.threshold is not None:
        threshold = config.threshold * share
        return [name for name in ranked if importance[name] <= threshold], threshold
    goal = math.floor(target_count(config.target_fraction or 0.0, adapters) * share)
    chosen = ranked[: max(0, goal - frozen)]
    return chosen, importance[chosen[-1]] if chosen else None


def rank(config: SafeConfig, importance: Mapping[str, float]) -> list[str]:
    """Return the adapters with finite importance that `never_freeze` does not match, least important first.

    Example:
        >>> rank(SafeConfig(never_freeze=("a",)), {"a": 0.1, "b": 0.3, "c": 0.2, "d": math.nan})
        ['c', 'b']
    """
    known = [name for name, value in importance.items() if math.isfinite(value)]
    may = [name for name in known if not any(fnmatchcase(name, pattern) for pattern in config.never_freeze)]
    return sorted(may, key=importance.__getitem__)


def target_count(fraction: float, adapters: int) -> int:
    """Return the number of adapters in a fraction, rounded to the nearest integer, halves up."""
    return math.floor(fraction * adapters + 0.5)


def check_fit(config: SafeConfig, names: Sequence[str], others_train: bool) -> None:
    """Reject options that do not fit a model's adapters: a pattern without a match, or nothing left to train."""
    for pattern in config.never_freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"never_freeze: {pattern!r} matches no adapter; use names such as {names[0]!r}.")
    counted = 0 if config.by_bytes else target_count(config.target_fraction or 0.0, len(names))
    if not others_train and (counted == len(names) or config.target_fraction == 1.0):
        raise ConfigError(
            f"target_fraction: {config.target_fraction} would freeze all {len(names)} adapters, and nothing else of "
            "this model trains; choose a smaller fraction."
        )
