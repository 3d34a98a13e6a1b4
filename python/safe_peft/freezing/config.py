"""Options of the method: the score, the target and the schedule."""

from __future__ import annotations

import operator
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError
from .curves import curve_names

Point = int | float
"""A point in the training: an int counts optimizer steps, a float is a share of the training."""
POINTS = ("warmup", "max_warmup", "freeze_end", "freeze_interval", "score_interval")

DEFAULT_FRACTION = 0.75
RENAMED = 'SafeConfig(target=...) is called freeze_by now, and "bytes" is its default; target will be removed.'
MAX_INT = 2**53
"""Floats, and so all JSON readers, represent integers exactly up to this one."""
_UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class SafeConfig:
    """Options of Selective Adapter FrEezing.

    Every point of the schedule is an int (optimizer steps) or a float in [0, 1] (a share of `total_steps`). The
    defaults are shares, so they fit short and long runs.

    Args:
        score: the measure of importance: "cka" (the method's own), or another registered score, see docs/method.md.
        target_fraction: share to freeze by `freeze_end`; 0.75 unless `threshold` or `memory_budget` is given.
        freeze_by: the unit of `target_fraction`. "bytes": a share of the bytes that freezing all adapters would save
            per step; sets of adapters with the least importance per byte freeze first. "adapters": a share of their
            number, as in the paper; the least important adapters freeze first.
        threshold: adapters with this importance or less are frozen from `freeze_end` on. It replaces the fraction.
        warmup: nothing is frozen before this point.
        max_warmup: warm-up ends here at the latest, even if importance still changes.
        stable_change: warm-up ends when no importance changes by more than this share between two scoring steps.
        freeze_end: the curve reaches its target here, with the last freeze event.
        freeze_interval: distance between freeze events.
        score_interval: distance between scoring steps, until the last freeze event.
        total_steps: optimizer steps of the whole training. A Trainer sets it; a custom training loop must pass it.
        score_blocks: row blocks per batch that "cka" reads.
        block_rows: rows per block.
        memory_budget: bytes that a step may retain for backward from `freeze_end` on, such as "6GiB" or an int. Before
            that, the limit falls along the same curve. Beyond the target, adapters freeze by importance per byte.
        recompute: frozen blocks that retain only their input and run again in backward: "off", "frozen" (all of them)
            or "auto" (those that `memory_budget` needs). Results are exact; each block's forward runs twice.
        keep_dropout: leave a frozen adapter's dropout on.
        curve: how the threshold rises from the end of warm-up to `freeze_end`: "cubic", or a registered curve.
        never_freeze: shell patterns; adapters with a matching name stay trainable.
        seed: seed of the score "random" and of the policy "random_sets".
        on_nonfinite: reaction to NaN or Inf in a score. "warn": training goes on, and such adapters stay trainable.
            "raise": a `ScoreError` stops the training after that step.
        policy: which adapters freeze for a share of bytes: "greedy" (the method's own), or one of the controls
            "random_sets", "prefix" and "autofreeze". Every other target needs "greedy".
        prefix_cache: bytes of memory, such as "2GiB", for the outputs of the frozen blocks at the bottom of the model.
            They run once per sample and are skipped in later epochs. None runs them in every epoch.
        prefix_file: further bytes in a temporary file, for outputs that do not fit into `prefix_cache`.
        prefix_dropout: leave the model's own dropout on in these blocks and before them. The cache needs False if the
            model has any; this changes the training.
        target: the old name of `freeze_by`; it gives a `FutureWarning`.

    Raises:
        ConfigError: An option has an invalid value.

    Example:
        >>> SafeConfig(target_fraction=0.5, warmup=100, max_warmup=200, freeze_end=800).score
        'cka'
    """

    score: str = "cka"
    target_fraction: float | None = None
    freeze_by: str = "bytes"
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
    policy: str = "greedy"
    prefix_cache: int | str | None = None
    prefix_file: int | str | None = None
    prefix_dropout: bool = True
    target: InitVar[str | None] = None

    def __post_init__(self, target: str | None) -> None:
        if target is not None:
            warnings.warn(RENAMED, FutureWarning, stacklevel=3)
            object.__setattr__(self, "freeze_by", target)
        for name in ("memory_budget", "prefix_cache", "prefix_file"):
            if (size := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_size(size, name))
        if self.memory_budget is None and self.target_fraction is None and self.threshold is None:
            object.__setattr__(self, "target_fraction", DEFAULT_FRACTION)
        patterns: Any = self.never_freeze
        if isinstance(patterns, list):
            object.__setattr__(self, "never_freeze", patterns := tuple(patterns))
        self._check_choices()
        self._check_target()
        for name in POINTS:
            _check_point(name, getattr(self, name))
        for name, least in {"score_blocks": 1, "block_rows": 1, "seed": 0, "total_steps": 1}.items():
            if name != "total_steps" or self.total_steps is not None:
                object.__setattr__(self, name, check_int(name, getattr(self, name), least))
        _check_number("stable_change", self.stable_change)
        if not self.prefix_dropout and self.prefix_cache is None and self.prefix_file is None:
            raise ConfigError("prefix_dropout: False needs a prefix_cache or a prefix_file; pass one of them.")
        for name in ("keep_dropout", "prefix_dropout"):
            _check(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))
        is_tuple = isinstance(patterns, tuple) and all(isinstance(pattern, str) for pattern in patterns)
        _check(is_tuple, "never_freeze", 'a tuple of shell patterns, such as ("*.layer.11.*",)', patterns)

    def _check_choices(self) -> None:
        from .policies import policy_names  # these import numpy and torch, and reading a report needs neither
        from .scores import score_names

        choices = {"curve": curve_names(), "score": score_names(), "policy": policy_names()}
        choices |= {"freeze_by": ["bytes", "adapters"], "recompute": ["off", "frozen", "auto"]}
        for name, known in (choices | {"on_nonfinite": ["warn", "raise"]}).items():
            _check(getattr(self, name) in known, name, f"one of {', '.join(known)}", getattr(self, name))

    def _check_target(self) -> None:
        if self.target_fraction is not None and self.threshold is not None:
            raise ConfigError(
                f"target_fraction and threshold: expected only one of them, got {self.target_fraction!r} and "
                f"{self.threshold!r}; pass target_fraction=None to freeze by threshold."
            )
        if self.target_fraction is not None:
            _check_number("target_fraction", self.target_fraction, most=1.0)
        if self.threshold is not None:
            _check_number("threshold", self.threshold)
        if self.policy != "greedy" and (not self.by_bytes or self.memory_budget is not None):
            raise ConfigError(
                f'policy: {self.policy!r} needs freeze_by="bytes" and a target_fraction, without threshold and '
                'memory_budget; change the target, or choose "greedy".'
            )
        if self.recompute == "auto" and self.memory_budget is None:
            raise ConfigError('recompute: "auto" needs a memory_budget; pass one, or choose "frozen".')

    @classmethod
    def paper(cls, **options: Any) -> SafeConfig:
        """Return the options of the paper's own method: 1 - CKA, a cubic curve, the least important adapters first.

        Args:
            options: further options, or others instead.

        Example:
            >>> SafeConfig.paper(target_fraction=0.5).freeze_by
            'adapters'
        """
        return cls(**{"score": "cka", "curve": "cubic", "freeze_by": "adapters", **options})

    @classmethod
    def of(cls, config: SafeConfig | Mapping[str, Any] | None) -> SafeConfig:
        """Return options unchanged, or make them from the output of `to_dict`; None means the defaults.

        Args:
            config: options, or options by name.

        Raises:
            ConfigError: It is neither, or an option is unknown or has an invalid value.

        Example:
            >>> SafeConfig.of({"score": "random"}).score
            'random'
        """
        return config if isinstance(config, SafeConfig) else cls.from_dict({} if config is None else config)

    @property
    def needs_plan(self) -> bool:
        """Whether a decision depends on bytes, and so on the shape of the batches."""
        return self.memory_budget is not None or self.by_bytes

    @property
    def by_bytes(self) -> bool:
        """Whether the target is a share of bytes."""
        return self.freeze_by == "bytes" and self.target_fraction is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values.

        Example:
            >>> SafeConfig.from_dict(SafeConfig(seed=3).to_dict()) == SafeConfig(seed=3)
            True
        """
        return {**asdict(self), "never_freeze": list(self.never_freeze)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SafeConfig:
        """Read the output of `to_dict`; a missing option keeps its default.

        Args:
            data: options by name.

        Raises:
            ConfigError: An option is unknown or has an invalid value.

        Example:
            >>> SafeConfig.from_dict({"score": "random"}).score
            'random'
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"config: expected a SafeConfig or a dict of its options, got {type(data).__name__}.")
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - {*names, "target"})
        if unknown:
            raise ConfigError(f"config: there is no option {', '.join(unknown)}; the options are {', '.join(names)}.")
        return cls(**data)


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if holds:
        return
    try:
        shown = repr(got)
    except ValueError:  # Python does not print integers of thousands of digits
        shown = "an integer too long to print"
    raise ConfigError(f"{name}: expected {expected}, got {shown[:200]}.")


def _check_number(name: str, value: object, most: float = sys.float_info.max) -> None:
    expected = "a number >= 0" if most == sys.float_info.max else f"a number between 0 and {most:g}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
    _check(is_number, name, expected, value)


def check_int(name: str, value: Any, least: int) -> int:
    """Return an option or an argument as a Python int, also if it is a numpy integer; tensors and files can hold it."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    _check(number >= least, name, f"an integer >= {least}", value)
    _check(number <= MAX_INT, name, f"an integer between {least} and {MAX_INT}", value)
    return number


def _check_point(name: str, value: object) -> None:
    is_share = isinstance(value, float) and 0.0 <= value <= 1.0
    is_step = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT
    expected = "optimizer steps (an int >= 0) or a share of the training (a float between 0.0 and 1.0)"
    _check(is_share or is_step, name, expected, value)


def parse_size(text: Any, option: str = "memory_budget") -> int:
    """Read a number of bytes: an int, or a text with a unit such as KB (1000), KiB (1024) or B.

    Example:
        >>> parse_size("6GiB"), parse_size("800 MB")
        (6442450944, 800000000)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise ConfigError(f'{option}: expected a size such as "6GiB", "800MB" or an int (bytes) above 0, got {text!r}.')
    return size
