"""Checks that a saved state is whole and belongs to this training before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import StateError
from ..files import jsonio
from ..files.checksum import check_signed, signed
from ..planning.inputs import Inputs
from ..planning.retained import Measured
from .config import MOST, SafeConfig
from .ledger import Ledger

VERSION = 4
PARTS = (
    "version",
    "step",
    "total_steps",
    "config",
    "optimizer",
    "adapters",
    "ledger",
    "evidence",
    "planned",
    "sha256",
)
FILES = "files"
"""Part of a state that stands in a checkpoint: what else makes it whole."""


@dataclass(frozen=True)
class Gathered:
    """A scoring under way, and its evidence in one process.

    Args:
        sums: for each adapter, of the step's forwards so far.
        importance: told before the optimizer's step.
        broken: what of that evidence was not finite, by adapter.
        due: the step that comes is to be scored; by the schedule, or since there was nothing yet to score by.
        process: whose evidence it is.
    """

    sums: tuple[tuple[float, ...], ...] = ()
    importance: dict[str, float] = field(default_factory=dict)
    broken: dict[str, tuple[str, ...]] = field(default_factory=dict)
    due: bool = False
    process: int = 0


@dataclass(frozen=True)
class Planned:
    """What decisions by bytes have to remember over a restart.

    Args:
        inputs: the largest batch seen, or None; of several processes the largest that they have agreed on.
        seen: the largest that this process has seen.
        recompute: blocks that are to run again in backward.
        warned: it was said that the budget cannot be met.
        measured: what a forward retained, where bytes are measured.
    """

    inputs: Inputs | None = None
    seen: Inputs | None = None
    recompute: tuple[str, ...] = ()
    warned: bool = False
    measured: Measured | None = None


@dataclass(frozen=True)
class Owner:
    """The training that a state belongs to.

    Args:
        config: the options; `total_steps` may differ, since a training may be made longer.
        optimizer: its type's name.
        adapters: what tells each adapter from another of its name, as JSON values, in the model's order.
        blocks: names of the transformer blocks.
        process: this one, of those that train together.
    """

    config: SafeConfig
    optimizer: str
    adapters: dict[str, dict[str, Any]]
    blocks: tuple[str, ...] = ()
    process: int = 0


@dataclass(frozen=True)
class Saved:
    """A state that was read: optimizer steps done and planned, and what is known."""

    step: int
    total_steps: int | None
    ledger: Ledger
    evidence: Gathered
    planned: Planned


def state_of(owner: Owner, saved: Saved) -> dict[str, Any]:
    """Return what `check_state` reads, as JSON values with a checksum.

    Args:
        owner: the training that this is the state of.
        saved: what is known.

    Example:
        >>> saved = Saved(3, None, Ledger(), Gathered(), Planned())
        >>> check_state(state_of(owner, saved), owner).step  # doctest: +SKIP
        3
    """
    parts = {"config": owner.config.to_dict(), "optimizer": owner.optimizer, "adapters": owner.adapters}
    return signed({"version": VERSION, **parts, **jsonio.encode(saved)})


def check_state(state: Mapping[str, Any], owner: Owner) -> Saved:
    """Read a freezer's saved state.

    A version that differs is refused, never guessed at: what a state means is known to the version that wrote it.

    Args:
        state: what `AdapterFreezer.state_dict` returned.
        owner: the training it has to fit; `on_nonfinite` may differ too, since it decides about no adapter.

    Returns:
        What it says.

    Raises:
        StateError: It is damaged, was edited, or belongs to other options, another optimizer or other adapters.

    Example:
        >>> check_state({}, Owner(SafeConfig(), "AdamW", {}))
        Traceback (most recent call last):
        safe_peft.errors.StateError: state: ...
    """
    _check_parts(state)
    _check_config(jsonio.decode(dict[str, Any], state["config"], "state.config"), owner.config.to_dict())
    optimizer = jsonio.decode(str, state["optimizer"], "state.optimizer")
    if optimizer != owner.optimizer:
        raise StateError(
            f"state was saved with the optimizer {optimizer[:60]}, and here is {owner.optimizer}; use the same one."
        )
    _check_adapters(jsonio.decode(dict[str, dict[str, Any]], state["adapters"], "state.adapters"), owner.adapters)
    saved = Saved(
        jsonio.decode(int, state["step"], "state.step"),
        jsonio.decode(int | None, state["total_steps"], "state.total_steps"),
        Ledger.from_dict(state["ledger"]),
        jsonio.decode(Gathered, state["evidence"], "state.evidence"),
        jsonio.decode(Planned, state["planned"], "state.planned"),
    )
    _check_agreement(saved, owner)
    _check_process(saved.evidence, owner)
    saved.ledger.order(owner.adapters)
    return saved


def _check_parts(state: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("state: this is none; pass what state_dict returned, or a file that save wrote.")
    version = state["version"]
    if isinstance(version, bool) or version != VERSION:
        raise StateError(
            f"state: its version is {jsonio.short(version)}, and this safe_peft reads version {VERSION} alone; go on "
            "with the safe_peft that wrote it, or start again."
        )
    if set(state) - {FILES} != set(PARTS):
        raise StateError(f"state: expected {', '.join(PARTS)}; it is damaged, so use an older one.")
    check_signed(state, "state")


def _check_config(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    other = _differences(saved, own, besides={"total_steps", "on_nonfinite"})
    if other:
        raise StateError(f"state was saved with other options: {other}; use the same SafeConfig.")


def _check_adapters(saved: Mapping[str, dict[str, Any]], own: Mapping[str, dict[str, Any]]) -> None:
    lacking, unknown = [n for n in own if n not in saved], [n for n in saved if n not in own]
    if lacking or unknown:
        raise StateError(
            f"state was saved for {len(saved)} adapters, and here are {len(own)}: it lacks {lacking[:3]} and has "
            f"{unknown[:3]} besides; use the same model and the same LoRA options."
        )
    other = [(name, _differences(saved[name], own[name])) for name in own if saved[name] != own[name]]
    if other:
        name, difference = other[0]
        raise StateError(
            f"state was saved for other adapters: {name} had {difference}, and {len(other) - 1} more differ; use the "
            "same model and the same LoRA options."
        )


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any], besides: Collection[str] = ()) -> str:
    names = sorted((set(saved) | set(own)) - set(besides))
    return ", ".join(
        f"{name}={saved.get(name)!r} (here {own.get(name)!r})" for name in names if saved.get(name) != own.get(name)
    )[:500]


def _check_agreement(saved: Saved, owner: Owner) -> None:
    """Whether the parts contradict each other: nothing that was written by this package does."""
    names, ledger = owner.adapters.keys(), saved.ledger
    total = saved.total_steps
    for holds, what in (
        (0 <= saved.step <= MOST, "step is beyond what can be counted"),
        (total is None or 0 < total <= MOST, "total_steps is beyond what can be counted"),
        (ledger.last_step <= saved.step, "its ledger tells of steps that were not done"),
        (set(ledger.names) <= names, "its ledger names adapters that it lacks"),
        (all(len(row) == 4 for row in saved.evidence.sums), "evidence.sums has a row that is not of four"),
        (len(saved.evidence.sums) in (0, len(names)), "evidence.sums is not of one row per adapter"),
        (saved.evidence.importance.keys() <= names, "evidence.importance names adapters that it lacks"),
        (saved.evidence.broken.keys() <= names, "evidence.broken names adapters that it lacks"),
        (set(saved.planned.recompute) <= set(owner.blocks), "planned.recompute names blocks that the model lacks"),
        (_is_batch(saved.planned.inputs), "planned.inputs is no batch"),
        (_is_batch(saved.planned.seen), "planned.seen is no batch"),
        (_is_table(saved.planned.measured, names), "planned.measured is of another model"),
    ):
        if not holds:
            raise StateError(f"state: {what}; it is damaged, so use an older one.")


def _check_process(evidence: Gathered, owner: Owner) -> None:
    """Another process has seen other rows: with its sums in all of them, some rows would count twice."""
    if (evidence.sums or evidence.importance) and evidence.process != owner.process:
        raise StateError(
            f"state was saved by process {evidence.process} within a step that is scored, and here is process "
            f"{owner.process}; save a state for each process, or between freezer.step() and the next forward."
        )


def _is_table(measured: Measured | None, names: Collection[str]) -> bool:
    return measured is None or (0 < measured.elements < MOST and measured.table.agrees(names))


def _is_batch(inputs: Inputs | None) -> bool:
    if inputs is None:
        return True
    if not all(map(_is_batch, inputs.further)):
        return False
    shapes = [spec.shape for spec in inputs.tensors.values()]
    dtypes = [spec.dtype for spec in inputs.tensors.values()] + ([inputs.autocast] if inputs.autocast else [])
    return (
        all(min(shape, default=0) >= 0 and math.prod(shape) < MOST for shape in shapes)
        and all(isinstance(getattr(torch, name, None), torch.dtype) for name in dtypes)
        and all(value is None or isinstance(value, bool | int | float | str) for value in inputs.constants.values())
    )
