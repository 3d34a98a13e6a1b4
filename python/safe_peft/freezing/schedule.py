"""The schedule of scoring steps and freeze events, as pure functions of the step.

Steps count finished optimizer steps, so the first is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..errors import ConfigError
from .config import Point, SafeConfig, check_int


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
    """Turn shares of the training into steps.

    Args:
        config: the options.
        total_steps: optimizer steps of the training; None means `config.total_steps`.

    Returns:
        The schedule in steps; intervals are at least one step.

    Raises:
        ConfigError: A share is used without a number of steps, or the points are not in order.

    Example:
        >>> resolve(SafeConfig(), total_steps=1000).freeze_end
        700
    """
    total = config.total_steps if total_steps is None else total_steps
    total = None if total is None else check_int("total_steps", total, least=1)
    points = {
        name: _steps(name, getattr(config, name), total)
        for name in ("warmup", "max_warmup", "freeze_end", "freeze_interval", "score_interval")
    }
    for earlier, later in (("warmup", "max_warmup"), ("max_warmup", "freeze_end")):
        if points[earlier] > points[later]:
            raise ConfigError(
                f"{later}: expected at least {earlier} ({getattr(config, earlier)!r}: step {points[earlier]}), got "
                f"{getattr(config, later)!r} (step {points[later]}); raise {later} or lower {earlier}."
            )
    for name in ("freeze_interval", "score_interval"):
        points[name] = max(1, points[name])
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
    """Whether importance is measured in this step: at every `score_interval` and at `freeze_end`.

    Example:
        >>> [step for step in range(1, 10) if is_scoring_step(Schedule(1, 2, 7, 2, 3), step)]
        [3, 6, 7]
    """
    return step <= schedule.freeze_end and (step % schedule.score_interval == 0 or step == schedule.freeze_end)


def is_freezing_step(schedule: Schedule, warmup_end: int | None, step: int) -> bool:
    """Whether adapters may freeze after this step: at every `freeze_interval` after warm-up and at `freeze_end`.

    Example:
        >>> [step for step in range(1, 10) if is_freezing_step(Schedule(1, 2, 7, 2, 3), 2, step)]
        [2, 4, 6, 7]
    """
    if warmup_end is None or not warmup_end <= step <= schedule.freeze_end:
        return False
    return (step - warmup_end) % schedule.freeze_interval == 0 or step == schedule.freeze_end


def is_stable(before: Mapping[str, float], now: Mapping[str, float], change: float) -> bool:
    """Whether no importance changed by more than the share `change` of itself between two scoring steps.

    Values that are not finite are ignored. Without finite values, importance is not stable.

    Example:
        >>> is_stable({"a": 1.0}, {"a": 1.04}, 0.05), is_stable({"a": 1.0}, {"a": 1.1}, 0.05)
        (True, False)
    """
    both = [(before[name], now[name]) for name in now if name in before]
    known = [(old, new) for old, new in both if math.isfinite(old) and math.isfinite(new)]
    return bool(known) and all(abs(new - old) <= change * abs(old) for old, new in known)


def choose(
    config: SafeConfig, importance: Mapping[str, float], *, adapters: int, frozen: int, share: float
) -> tuple[list[str], float | None]:
    """Choose the adapters to freeze now by the curve, least important first.

    Args:
        config: gives the target (a threshold or a fraction) and `never_freeze`.
        importance: of the live adapters. Adapters without finite importance or in `never_freeze` are never chosen.
        adapters: the number of all adapters; the fraction is a share of it.
        frozen: the number of frozen adapters.
        share: the result of `curve_value`.

    Returns:
        Their names, and the threshold of the curve. With a fraction it is the highest chosen importance, or None.

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
    fraction = config.target_fraction or 0.0
    goal = math.floor(target_count(fraction, adapters) * share)
    chosen = ranked[: max(0, goal - frozen)]
    return chosen, importance[chosen[-1]] if chosen else None


def rank(config: SafeConfig, importance: Mapping[str, float]) -> list[str]:
    """Return the adapters with finite importance that `never_freeze` does not match, least important first.

    Example:
        >>> rank(SafeConfig(never_freeze=("a",)), {"a": 0.1, "b": 0.3, "c": 0.2, "d": math.nan})
        ['c', 'b']
    """
    known = [name for name, value in importance.items() if math.isfinite(value) and not _is_spared(config, name)]
    return sorted(known, key=importance.__getitem__)


def target_count(fraction: float, adapters: int) -> int:
    """Return the number of adapters in a fraction, rounded to the nearest integer, halves up.

    Example:
        >>> target_count(0.75, 6)
        5
    """
    return math.floor(fraction * adapters + 0.5)


def check_fit(config: SafeConfig, names: Sequence[str], others_train: bool) -> None:
    """Reject options that do not fit a model's adapters.

    Args:
        config: the options.
        names: the names of the adapters.
        others_train: whether the model trains other parameters too.

    Raises:
        ConfigError: A pattern matches no adapter, or nothing would remain to train.

    Example:
        >>> check_fit(SafeConfig(never_freeze=("*.query",)), ["layer.0.query"], others_train=True)
    """
    for pattern in config.never_freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"never_freeze: {pattern!r} matches no adapter; use names such as {names[0]!r}.")
    counted = 0 if config.by_bytes else target_count(config.target_fraction or 0.0, len(names))
    if not others_train and (counted == len(names) or config.target_fraction == 1.0):
        raise ConfigError(
            f"target_fraction: {config.target_fraction} would freeze all {len(names)} adapters, and nothing else of "
            "this model trains; choose a smaller fraction."
        )


def _is_spared(config: SafeConfig, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in config.never_freeze)
