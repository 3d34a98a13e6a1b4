"""A freezer's state as JSON values, which has to fit the training that goes on from it."""

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
"""Part of a state in a checkpoint: the SHA-256 of the other files that make it whole."""


@dataclass(frozen=True)
class Gathered:
    """A scoring step under way, and its evidence in one process.

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
        process: this one, of those that train together.
    """

    config: SafeConfig
    optimizer: str
    adapters: dict[str, dict[str, Any]]
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
    """Return what `check_state` reads, as JSON values.

    Args:
        owner: the training that this is the state of.
        saved: what is known.

    Example:
        >>> owner = Owner(SafeConfig(), "AdamW", {})
        >>> check_state(state_of(owner, Saved(3, None, Ledger(), Gathered(), Planned())), owner).step
        3
    """
    parts = {"config": owner.config.to_dict(), "optimizer": owner.optimizer, "adapters": owner.adapters}
    return {"version": VERSION, **parts, **jsonio.encode(saved)}


def check_state(state: Mapping[str, Any], owner: Owner) -> Saved:
    """Read a freezer's saved state.

    A version that differs is refused, never guessed at: what a state means is known to the version that wrote it.

    Args:
        state: what `AdapterFreezer.state_dict` returned.
        owner: the training it has to fit; `on_nonfinite` may differ too, since it decides about no adapter.

    Returns:
        What it says.

    Raises:
        StateError: It is damaged, or belongs to other options, another optimizer or other adapters.

    Example:
        >>> check_state({}, Owner(SafeConfig(), "AdamW", {}))
        Traceback (most recent call last):
        safe_peft.errors.StateError: state: ...
    """
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError("state: this is none; pass what state_dict returned, or a file that save wrote.")
    if state["version"] != VERSION:
        raise StateError(
            f"state: its version is {state['version']!r:.20}, and this safe_peft reads version {VERSION} alone; go on "
            "with the safe_peft that wrote it, or start again."
        )
    kinds = {"config": dict[str, Any], "optimizer": str, "adapters": dict[str, dict[str, Any]]}
    config, optimizer, adapters = (jsonio.decode(kinds[name], state.get(name), f"state.{name}") for name in kinds)
    _check_config(config, owner.config.to_dict())
    if optimizer != owner.optimizer:
        raise StateError(
            f"state was saved with the optimizer {optimizer}, and here is {owner.optimizer}; use the same one."
        )
    _check_adapters(adapters, owner.adapters)
    names = {one.name for one in fields(Saved)}
    saved: Saved = jsonio.decode(Saved, {name: state[name] for name in names & state.keys()}, "state")
    _check_process(saved.evidence, owner)
    saved.ledger.order(owner.adapters)
    return saved


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


def _check_process(evidence: Gathered, owner: Owner) -> None:
    """Another process has seen other rows: with its sums in all of them, some rows would count twice."""
    if (evidence.sums or evidence.importance) and evidence.process != owner.process:
        raise StateError(
            f"state was saved by process {evidence.process} within a step that is scored, and here is process "
            f"{owner.process}; save a state for each process, or between freezer.step() and the next forward."
        )
