"""A freezer's state as JSON values. A training that loads it must match it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from safe_kernels.reference import MASK_VERSION

from ..errors import StateError
from ..files import jsonio
from ..planning.inputs import Inputs
from ..planning.retained import Measured
from .ledger import Ledger

VERSION = 4
FILES = "files"
"""Key of a checkpoint's state: the SHA-256 of the checkpoint's other files."""


@dataclass(frozen=True)
class PendingScoring:
    """The evidence of an unfinished scoring step in one process.

    Args:
        sums: for each adapter, the sums over the step's forwards so far.
        importance: importance computed before the optimizer's step.
        broken: by adapter, the parts of its evidence that are not finite.
        due: the next step is a scoring step, by the schedule or because the last one had no evidence.
        process: the process that gathered the evidence.
    """

    sums: tuple[tuple[float, ...], ...] = ()
    importance: dict[str, float] = field(default_factory=dict)
    broken: dict[str, tuple[str, ...]] = field(default_factory=dict)
    due: bool = False
    process: int = 0


@dataclass(frozen=True)
class Planned:
    """State that decisions by bytes need after a restart.

    Args:
        inputs: the largest batch, or None; with several processes, the largest one that they agreed on.
        seen: the largest batch in this process.
        recompute: blocks to recompute in backward.
        warned: the warning that the budget cannot be met was logged.
        measured: bytes that a forward retained, if bytes are measured.
    """

    inputs: Inputs | None = None
    seen: Inputs | None = None
    recompute: tuple[str, ...] = ()
    warned: bool = False
    measured: Measured | None = None


@dataclass(frozen=True)
class RunIdentity:
    """The training that a state belongs to: options, the optimizer's type, and adapters in the model's order."""

    config: dict[str, Any]
    optimizer: str
    adapters: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class FreezerState:
    """The state that changes during a training.

    A state from an earlier safe_peft has no `memory`, the score's own numbers, and no `mask_version`, the version of
    dropout's random bits.
    """

    step: int
    total_steps: int | None
    ledger: Ledger
    evidence: PendingScoring
    planned: Planned
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    mask_version: int = MASK_VERSION


def state_of(owner: RunIdentity, saved: FreezerState) -> dict[str, Any]:
    """Return a state as JSON values, for `check_state`."""
    return {"version": VERSION, **jsonio.encode(owner), **jsonio.encode(saved)}


def check_state(state: Mapping[str, Any], owner: RunIdentity, process: int) -> FreezerState:
    """Read a freezer's saved state, which must be of this version, and of the same training and process."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("state: this is not a freezer's state; pass the output of state_dict, or a file from save.")
    if state["version"] != VERSION:
        raise StateError(
            f"state: its version is {state['version']!r:.20}, and this safe_peft reads only version {VERSION}; use the "
            "safe_peft that wrote it, or start the training again."
        )
    was: RunIdentity = _part(RunIdentity, state)
    if "target" in was.config:  # the old name
        was.config["freeze_by"] = was.config.pop("target")
    _check_config({"prefix_dropout": True, "policy": "greedy"} | was.config, owner.config)  # newer than some states
    if was.optimizer != owner.optimizer:
        what = f"the optimizer {was.optimizer}, but this training uses {owner.optimizer}; use the same."
        raise StateError(f"state was saved with {what}")
    _check_adapters(was.adapters, owner.adapters)
    saved: FreezerState = _part(FreezerState, {"mask_version": 1, **state})  # newer than some states
    # If all processes loaded one process's sums, the rows of that process would count several times.
    if (saved.evidence.sums or saved.evidence.importance) and saved.evidence.process != process:
        raise StateError(
            f"state was saved by process {saved.evidence.process} within a scoring step, but this is process "
            f"{process}; save one state per process, or save between freezer.step() and the next forward."
        )
    saved.ledger.order(owner.adapters)
    return saved


def _part(kind: Any, state: Mapping[str, Any]) -> Any:
    return jsonio.decode(kind, {one.name: state[one.name] for one in fields(kind) if one.name in state}, "state")


def _check_config(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    free = {"total_steps", "on_nonfinite", "prefix_cache", "prefix_file"}  # they affect no decision
    free |= {"freeze_by"} if own["target_fraction"] is None else set()
    if other := _differences(saved, own, apart_from=free):
        raise StateError(f"state was saved with other options: {other}; use the same SafeConfig.")


def _check_adapters(saved: Mapping[str, dict[str, Any]], own: Mapping[str, dict[str, Any]]) -> None:
    lacking, unknown = [n for n in own if n not in saved], [n for n in saved if n not in own]
    if lacking or unknown:
        raise StateError(
            f"state was saved for {len(saved)} adapters, but this model has {len(own)}: the state lacks "
            f"{lacking[:3]} and has {unknown[:3]} in addition; use the same model and the same LoRA options."
        )
    if other := [name for name in own if saved[name] != own[name]]:
        raise StateError(
            f"state was saved for other adapters: {other[0]} had {_differences(saved[other[0]], own[other[0]])}, and "
            f"{len(other) - 1} more differ; use the same model and the same LoRA options."
        )


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any], apart_from: Collection[str] = ()) -> str:
    names = [name for name in sorted({*saved, *own} - set(apart_from)) if saved.get(name) != own.get(name)]
    return ", ".join(f"{name}={saved.get(name)!r} (here {own.get(name)!r})" for name in names)[:500]
