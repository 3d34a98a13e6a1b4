"""The method's options: what to score, how far to freeze, and when."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError
from .curves import curve_names

Point = int | float
"""A moment of the training: an int counts optimizer steps, a float is a share of the training."""

DEFAULT_FRACTION = 0.75
TARGETS = ("adapters", "bytes")
RECOMPUTE = ("off", "frozen", "auto")
ON_NONFINITE = ("warn", "raise")
MOST = 2**53
"""As far as floats, and with them any reader of JSON, count exactly."""
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for unit, base in (("B", 1000), ("iB", 1024))
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class SafeConfig:
    """Options of Selective Adapter FrEezing.

    Every moment of the schedule is either an int (optimizer steps) or a float in [0, 1] (a share of the training, whose
    length is `total_steps`). The defaults are shares, so that a short run and a long one both freeze sensibly.

    Args:
        score: what importance means: "cka" (the method's own), "relative_norm", "gradient_sensitivity" or "random".
        target_fraction: share to freeze by `freeze_end`; 0.75 unless `threshold` or `memory_budget` is given.
        target: what that is a share of: of the "adapters", the least important first, or of the "bytes" that freezing
            them all would save; then whatever is worth least a byte freezes, in sets that free something.
        threshold: importance at or below which an adapter is frozen from `freeze_end` on, instead of a fraction.
        warmup: nothing is frozen before this moment.
        max_warmup: warm-up ends here at the latest, however much importance still changes.
        stable_change: warm-up ends once no importance changes by more than this share between two scorings.
        freeze_end: when the curve reaches its target: the last freezing.
        freeze_interval: adapters are frozen in batches, this far apart.
        score_interval: how often importance is measured, until the last freezing.
        total_steps: optimizer steps of the whole training; a Trainer knows it, a raw loop states it.
        score_blocks: row blocks of a batch that "cka" looks at.
        block_rows: rows in such a block.
        memory_budget: what a step may retain for backward from `freeze_end` on, such as "6GiB", or bytes. On the way
            there the limit comes down along the same curve; beyond the target, adapters freeze by importance per byte.
        recompute: blocks that retain their input alone and run again in backward once they are frozen: "off", "frozen"
            (all of them) or "auto" (those that `memory_budget` takes). Exact, and costs the time of their forward.
        keep_dropout: leave a frozen adapter's dropout on.
        curve: how the threshold rises from the end of warm-up to `freeze_end`: "cubic", or what `register_curve` knows.
        never_freeze: shell patterns; adapters whose name matches one stay trainable.
        seed: fixes the score "random".
        on_nonfinite: what NaN or Inf in a score does: "warn" goes on, and such adapters stay trainable; "raise" stops
            the training with a `ScoreError` after the step in which it is seen.

    Raises:
        ConfigError: An option has a value that cannot work.

    Example:
        >>> SafeConfig(target_fraction=0.5, warmup=100, max_warmup=200, freeze_end=800).score
        'cka'
    """

    score: str = "cka"
    target_fraction: float | None = None
    target: str = "adapters"
    threshold: float | None = None
    warmup: Point = 0.2
    max_warmup: Point = 0.3
    stable_change: float = 0.05
    freeze_end: Point = 0.7
    freeze_interval: Point = 0.05
    score_interval: Point = 0.05
    total_steps: int | None = None
    score_blocks: int = 4
    block_rows: int = 128
    memory_budget: int | str | None = None
    recompute: str = "off"
    keep_dropout: bool = False
    curve: str = "cubic"
    never_freeze: tuple[str, ...] = ()
    seed: int = 0
    on_nonfinite: str = "warn"

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            object.__setattr__(self, "memory_budget", parse_size(self.memory_budget))
        elif self.target_fraction is None and self.threshold is None:
            object.__setattr__(self, "target_fraction", DEFAULT_FRACTION)
        patterns: Any = self.never_freeze
        if isinstance(patterns, list):
            object.__setattr__(self, "never_freeze", patterns := tuple(patterns))
        self._check_names()
        self._check_target()
        for name in ("warmup", "max_warmup", "freeze_end", "freeze_interval", "score_interval"):
            _check_point(name, getattr(self, name))
        integers = {"score_blocks": 1, "block_rows": 1, "seed": 0}
        if self.total_steps is not None:
            integers["total_steps"] = 1
        for name, least in integers.items():
            object.__setattr__(self, name, check_int(name, getattr(self, name), least))
        _check_number("stable_change", self.stable_change)
        choices = f"one of {', '.join(ON_NONFINITE)}"
        _check(self.on_nonfinite in ON_NONFINITE, "on_nonfinite", choices, self.on_nonfinite)
        _check(isinstance(self.keep_dropout, bool), "keep_dropout", "True or False", self.keep_dropout)
        is_tuple = isinstance(patterns, tuple) and all(isinstance(pattern, str) for pattern in patterns)
        _check(is_tuple, "never_freeze", 'a tuple of shell patterns, such as ("*.layer.11.*",)', patterns)

    def _check_names(self) -> None:
        from .scores import score_names  # imports torch, which reading a report does not need

        _check(self.curve in curve_names(), "curve", f"one of {', '.join(curve_names())}", self.curve)
        _check(self.score in score_names(), "score", f"one of {', '.join(score_names())}", self.score)

    def _check_target(self) -> None:
        if self.target_fraction is not None and self.threshold is not None:
            raise ConfigError(
                f"target_fraction and threshold: expected one of them, got {self.target_fraction!r} and "
                f"{self.threshold!r}; pass target_fraction=None to freeze by threshold."
            )
        if self.target_fraction is not None:
            _check_number("target_fraction", self.target_fraction, most=1.0)
        if self.threshold is not None:
            _check_number("threshold", self.threshold)
        _check(self.target in TARGETS, "target", f"one of {', '.join(TARGETS)}", self.target)
        if self.target == "bytes" and self.target_fraction is None:
            raise ConfigError('target: "bytes" says what target_fraction is a share of; give target_fraction=....')
        _check(self.recompute in RECOMPUTE, "recompute", f"one of {', '.join(RECOMPUTE)}", self.recompute)
        if self.recompute == "auto" and self.memory_budget is None:
            raise ConfigError('recompute: "auto" needs a memory_budget to meet; give one, or choose "frozen".')

    @classmethod
    def of(cls, config: SafeConfig | Mapping[str, Any] | None) -> SafeConfig:
        """Return the options themselves, or make them of what `to_dict` writes; None is the defaults.

        Args:
            config: options, or options by name.

        Raises:
            ConfigError: It is neither, or an option is unknown or has a value that cannot work.

        Example:
            >>> SafeConfig.of({"score": "random"}).score
            'random'
        """
        return config if isinstance(config, SafeConfig) else cls.from_dict({} if config is None else config)

    @property
    def needs_plan(self) -> bool:
        """Whether a decision depends on bytes, and so on the shape of the batches."""
        return self.memory_budget is not None or self.target == "bytes"

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values.

        Example:
            >>> SafeConfig.from_dict(SafeConfig(seed=3).to_dict()) == SafeConfig(seed=3)
            True
        """
        return {**asdict(self), "never_freeze": list(self.never_freeze)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SafeConfig:
        """Read what `to_dict` wrote; an option that is missing keeps its default.

        Args:
            data: options by name.

        Raises:
            ConfigError: An option is unknown, or has a value that cannot work.

        Example:
            >>> SafeConfig.from_dict({"score": "random"}).score
            'random'
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"config: expected options by name, got {type(data).__name__}.")
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(names))
        if unknown:
            raise ConfigError(f"config has no option {', '.join(unknown)}; the options are {', '.join(names)}.")
        return cls(**data)


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise _wrong(name, expected, got)


def _wrong(name: str, expected: str, got: object) -> ConfigError:
    try:
        shown = repr(got)
    except ValueError:  # Python does not print integers of thousands of digits
        shown = "an integer too long to print"
    return ConfigError(f"{name}: expected {expected}, got {shown[:200]}.")


def _check_number(name: str, value: object, most: float = sys.float_info.max) -> None:
    expected = "a number >= 0" if most == sys.float_info.max else f"a number between 0 and {most:g}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
    _check(is_number, name, expected, value)


def check_int(name: str, value: Any, least: int) -> int:
    """See that an option or an argument is an integer that tensors and files can hold.

    Args:
        name: what it is called.
        value: what came.
        least: the smallest that makes sense.

    Returns:
        The same as a Python int, if it was one of numpy's.

    Raises:
        ConfigError: It is no such integer.

    Example:
        >>> check_int("total_steps", 16, least=1)
        16
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise _wrong(name, f"an integer >= {least}", value)
    _check(number <= MOST, name, f"an integer between {least} and {MOST}", value)
    return number


def _check_point(name: str, value: object) -> None:
    is_share = isinstance(value, float) and 0.0 <= value <= 1.0
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST
    expected = "optimizer steps (an int >= 0) or a share of the training (a float between 0.0 and 1.0)"
    _check(is_share or is_step, name, expected, value)


def parse_size(text: Any, option: str = "memory_budget") -> int:
    """Read a number of bytes.

    Args:
        text: an int, or a number with a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (of 1024).
        option: named in errors.

    Raises:
        ConfigError: It is no such thing, or not above zero.

    Example:
        >>> parse_size("6GiB"), parse_size("800 MB")
        (6442450944, 800000000)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        unit = next((u for u in _UNITS if match and u.lower() == match[2].lower()), None)
        size = int(float(match[1]) * _UNITS[unit]) if match and unit is not None else 0
    if size < 1:
        raise ConfigError(f'{option}: expected bytes above zero, such as "6GiB", "800MB" or an int, got {text!r}.')
    return size
