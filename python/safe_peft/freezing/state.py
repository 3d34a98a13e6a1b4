"""A freezer's state as JSON values. A training that loads it must match it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import StateError
from ..files import jsonio
from ..planning.inputs import Inputs
from ..planning.retained import Measured
from .config import SafeConfig
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
    """The training that a state belongs to.

    Args:
        config: the options; `total_steps` may differ, because a training may become longer.
        optimizer: the name of the optimizer's type.
        adapters: the properties of each adapter by name, as JSON values, in the model's order.
        process: the number of this process.
    """

    config: SafeConfig
    optimizer: str
    adapters: dict[str, dict[str, Any]]
    process: int = 0


@dataclass(frozen=True)
class FreezerState:
    """A loaded state.

    Args:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole training, if known.
        ledger: the record of scoring steps and freeze events.
        evidence: of an unfinished scoring step.
        planned: what decisions by bytes need.
        memory: the score's own numbers, by adapter; a state from an earlier safe_peft has none.
    """

    step: int
    total_steps: int | None
    ledger: Ledger
    evidence: PendingScoring
    planned: Planned
    memory: dict[str, dict[str, float]] = field(default_factory=dict)


def state_of(owner: RunIdentity, saved: FreezerState) -> dict[str, Any]:
    """Return a state as JSON values, for `check_state`.

    Args:
        owner: the training of this state.
        saved: the state.

    Example:
        >>> owner = RunIdentity(SafeConfig(), "AdamW", {})
        >>> check_state(state_of(owner, FreezerState(3, None, Ledger(), PendingScoring(), Planned())), owner).step
        3
    """
    parts = {"config": owner.config.to_dict(), "optimizer": owner.optimizer, "adapters": owner.adapters}
    return {"version": VERSION, **parts, **jsonio.encode(saved)}


def check_state(state: Mapping[str, Any], owner: RunIdentity) -> FreezerState:
    """Read a freezer's saved state. A state of another version is rejected.

    Args:
        state: the output of `AdapterFreezer.state_dict`.
        owner: the training that it must match; options that affect no decision may differ.

    Returns:
        The loaded state.

    Raises:
        StateError: It is damaged, or belongs to other options, another optimizer or other adapters.

    Example:
        >>> check_state({}, RunIdentity(SafeConfig(), "AdamW", {}))
        Traceback (most recent call last):
        safe_peft.errors.StateError: state: ...
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("state: this is not a freezer's state; pass the output of state_dict, or a file from save.")
    if state["version"] != VERSION:
        raise StateError(
            f"state: its version is {state['version']!r:.20}, and this safe_peft reads only version {VERSION}; use the "
            "safe_peft that wrote it, or start the training again."
        )
    kinds = {"config": dict[str, Any], "optimizer": str, "adapters": dict[str, dict[str, Any]]}
    config, optimizer, adapters = (jsonio.decode(kinds[name], state.get(name), f"state.{name}") for name in kinds)
    if "target" in config:  # the old name
        config["freeze_by"] = config.pop("target")
    config = {"prefix_dropout": True, "policy": "greedy"} | config  # newer than some saved states
    _check_config(config, owner.config.to_dict())
    if optimizer != owner.optimizer:
        raise StateError(
            f"state was saved with the optimizer {optimizer}, but this training uses {owner.optimizer}; use the same."
        )
    _check_adapters(adapters, owner.adapters)
    names = {one.name for one in fields(FreezerState)}
    saved: FreezerState = jsonio.decode(FreezerState, {name: state[name] for name in names & state.keys()}, "state")
    _check_process(saved.evidence, owner)
    saved.ledger.order(owner.adapters)
    return saved


def _check_config(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    free = {"total_steps", "on_nonfinite", "prefix_cache", "prefix_file"}
    free |= {"freeze_by"} if own["target_fraction"] is None else set()
    other = _differences(saved, own, besides=free)
    if other:
        raise StateError(f"state was saved with other options: {other}; use the same SafeConfig.")


def _check_adapters(saved: Mapping[str, dict[str, Any]], own: Mapping[str, dict[str, Any]]) -> None:
    lacking, unknown = [n for n in own if n not in saved], [n for n in saved if n not in own]
    if lacking or unknown:
        raise StateError(
            f"state was saved for {len(saved)} adapters, but this model has {len(own)}: the state lacks "
            f"{lacking[:3]} and has {unknown[:3]} in addition; use the same model and the same LoRA options."
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


def _check_process(evidence: PendingScoring, owner: RunIdentity) -> None:
    """If all processes loaded one process's sums, the rows of that process would count several times."""
    if (evidence.sums or evidence.importance) and evidence.process != owner.process:
        raise StateError(
            f"state was saved by process {evidence.process} within a scoring step, but this is process "
            f"{owner.process}; save one state per process, or save between freezer.step() and the next forward."
        )
