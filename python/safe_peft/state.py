"""Checks that a saved state belongs to this model and these options before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import jsonio
from .config import SafeConfig
from .errors import StateError
from .ledger import Ledger
from .planning.inputs import Inputs

VERSION = 2
PARTS = ("version", "step", "config", "adapters", "ledger", "evidence", "planned")


@dataclass(frozen=True)
class Gathered:
    """Evidence of a scoring under way: sums for each adapter, or importance told before the optimizer's step."""

    sums: tuple[tuple[float, ...], ...] = ()
    importance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """What decisions by bytes have to remember over a restart.

    Args:
        inputs: the largest batch seen, or None.
        recompute: blocks that are to run again in backward.
        warned: it was said that the budget cannot be met.
    """

    inputs: Inputs | None = None
    recompute: tuple[str, ...] = ()
    warned: bool = False


def check_state(
    state: Mapping[str, Any], config: SafeConfig, names: Sequence[str]
) -> tuple[int, Ledger, Gathered, Planned]:
    """Read a freezer's saved state.

    Args:
        state: what `AdapterFreezer.state_dict` returned.
        config: the options it has to fit; `total_steps` may differ, since a training may be made longer, and so may
            `on_nonfinite`, which decides about no adapter.
        names: the adapters it has to fit.

    Returns:
        The optimizer steps done, the ledger, the evidence of a scoring under way, and what was planned.

    Raises:
        StateError: It is damaged, or belongs to other options or other adapters.

    Example:
        >>> check_state({}, SafeConfig(), ())
        Traceback (most recent call last):
        safe_peft.errors.StateError: state: ...
    """
    if not isinstance(state, Mapping) or set(state) != set(PARTS) or state["version"] != VERSION:
        raise StateError(
            f"state: expected version {VERSION} with {', '.join(PARTS)}; it is damaged or of another version."
        )
    step = jsonio.decode(int, state["step"], "state.step")
    _check_config(jsonio.decode(dict[str, Any], state["config"], "state.config"), config.to_dict())
    saved = jsonio.decode(tuple[str, ...], list(state["adapters"]), "state.adapters")
    if saved != tuple(names):
        lacking, unknown = [n for n in names if n not in saved], [n for n in saved if n not in names]
        raise StateError(
            f"state was saved for {len(saved)} adapters, and here are {len(names)}: it lacks {lacking[:3]} and has "
            f"{unknown[:3]} besides; use the same model and the same LoRA options."
        )
    ledger = Ledger.from_dict(state["ledger"])
    evidence = jsonio.decode(Gathered, state["evidence"], "state.evidence")
    planned = jsonio.decode(Planned, state["planned"], "state.planned")
    fits = all(len(row) == 4 for row in evidence.sums) and len(evidence.sums) in (0, len(names))
    if not fits or not set(ledger.frozen) <= set(names):
        raise StateError(
            "state: its ledger or its evidence does not fit its adapters; it is damaged, so save it again."
        )
    return step, ledger, evidence, planned


def _check_config(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    names = (set(saved) | set(own)) - {"total_steps", "on_nonfinite"}
    other = sorted(name for name in names if saved.get(name) != own.get(name))
    if other:
        values = ", ".join(f"{name}={saved.get(name)!r} (here {own.get(name)!r})" for name in other)
        raise StateError(f"state was saved with other options: {values}; use the same SafeConfig.")
