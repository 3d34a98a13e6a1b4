"""Policies: which adapters freeze so that a step stays within a limit in bytes. Each is a registered function."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import median

from ..errors import ConfigError
from ..planning.greedy import fit
from ..planning.retained import RetainedTable
from .registry import Registry


@dataclass(frozen=True)
class PolicyInputs:
    """The inputs of a policy at one freeze event.

    Args:
        importance: of the adapters that may freeze now, the least important first.
        table: the bytes that a step retains, see `bytes`; its `adapters` are in the model's order, the lowest first.
        limit: the bytes that a step may retain from now on.
        share: the value of the schedule's curve, 0 to 1. The limit is already that of this share.
        frozen: the adapters that are frozen already.
        earlier: importance in the scoring step before the latest one; empty if there is none.
        seed: `SafeConfig.seed`.
        recompute: the blocks that run again in backward once they are frozen.
        keep_one: one adapter must stay live, because nothing else trains.

    Example:
        >>> from safe_peft.planning.retained import Saver, Storage
        >>> hold = [Storage(64, (Saver(n, "LoRA inputs", -1, 1 << i, i),)) for i, n in enumerate("ab")]
        >>> inputs = PolicyInputs({"a": 0.2, "b": 0.1}, RetainedTable(("a", "b"), (), tuple(hold)), limit=100)
        >>> inputs.bytes(["b"]), inputs.until_met(["a", "b"]), greedy(inputs)
        (64, ['a'], ['b'])
    """

    importance: Mapping[str, float]
    table: RetainedTable
    limit: int
    share: float = 1.0
    frozen: Sequence[str] = ()
    earlier: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    recompute: Sequence[str] = ()
    keep_one: bool = False

    def bytes(self, names: Collection[str] = ()) -> int:
        """Return the bytes that a step retains if these adapters freeze too.

        Args:
            names: the adapters.
        """
        return self.table.bytes([*self.frozen, *names], self.recompute)

    def until_met(self, order: Iterable[str]) -> list[str]:
        """Return the adapters that may freeze, in this order, up to the first one with which the limit is met.

        Args:
            order: names of adapters; those that may not freeze now are left out.
        """
        chosen: list[str] = []
        for name in order:
            if self.bytes(chosen) <= self.limit:
                break
            if name in self.importance:
                chosen.append(name)
        return chosen


Policy = Callable[[PolicyInputs], Sequence[str]]
_POLICIES = Registry[Policy]("policy")


def register_policy(name: str) -> Callable[[Policy], Policy]:
    """Register a policy under a name for `SafeConfig.policy`.

    Args:
        name: the new policy's name.

    Returns:
        A decorator for a function from `PolicyInputs` to the names of the adapters that freeze now.

    Raises:
        ConfigError: The name is taken.

    Example:
        >>> @register_policy("suffix")
        ... def suffix(inputs: PolicyInputs) -> list[str]:
        ...     return inputs.until_met(reversed(inputs.table.adapters))
    """
    return _POLICIES.adding(name, lambda function: function)


def policy_names() -> list[str]:
    """Return the names of the registered policies."""
    return sorted(_POLICIES)


def choose_by(policy: str, inputs: PolicyInputs) -> list[str]:
    """Return the adapters that freeze now, by a registered policy."""
    chosen = list(dict.fromkeys(_POLICIES[policy](inputs)))
    if wrong := [name for name in chosen if name not in inputs.importance]:
        raise ConfigError(f"policy {policy!r}: expected names from inputs.importance, got {wrong[:3]}.")
    return chosen


@register_policy("greedy")
def greedy(inputs: PolicyInputs) -> list[str]:
    """Freeze the adapters with the least importance per byte: see `planning.greedy.fit`."""
    frozen, again, one = inputs.frozen, "frozen" if inputs.recompute else "off", inputs.keep_one
    return list(fit(inputs.table, inputs.importance, inputs.limit, frozen=frozen, recompute=again, keep_one=one).freeze)


@register_policy("random_sets")
def random_sets(inputs: PolicyInputs) -> list[str]:
    """Freeze adapters in a random order until the limit is met, without those that it does not need: a control.

    The set meets the same limit as any other policy's, and needs each of its members for it. Otherwise a model of 30
    blocks would freeze completely to save a quarter of its bytes, because one live adapter in the lowest layer keeps
    the graph of all layers. For the same reason most sets are prefixes if frozen blocks are not recomputed. The score
    "random" with "greedy" is no such control: it chooses by bytes too.
    """
    order = list(inputs.table.adapters)
    random.Random(inputs.seed).shuffle(order)
    chosen = inputs.until_met(order)
    for name in reversed(chosen):
        rest = [one for one in chosen if one != name]
        if inputs.bytes(rest) <= inputs.limit:
            chosen = rest
    return chosen


@register_policy("prefix")
def prefix(inputs: PolicyInputs) -> list[str]:
    """Freeze the lowest adapters first until the limit is met: a control, which reads no importance."""
    return inputs.until_met(inputs.table.adapters)


@register_policy("autofreeze")
def autofreeze(inputs: PolicyInputs) -> list[str]:
    """Freeze a prefix of blocks as long as the next block has nearly stopped changing, within the limit: a control.

    AutoFreeze (Liu et al. 2021, arXiv 2102.01386) freezes the next block if its change, |n(t - D) - n(t)| / n(t - D)
    with n the norm of its gradients, is not above the median of all blocks that still train. Here n is the sum of the
    importance of its adapters, so choose a score of gradients, such as "gradient_sensitivity".
    """
    members = [
        [name for index, name in enumerate(inputs.table.adapters) if block.holds >> index & 1]
        for block in inputs.table.blocks
    ]
    training = [names for names in members if not set(names) <= set(inputs.frozen)]
    changes = [_change(inputs, names) for names in training]
    limit = median(filter(math.isfinite, changes)) if any(map(math.isfinite, changes)) else -1.0
    still = list(takewhile(lambda pair: pair[1] <= limit, zip(training, changes, strict=True)))
    return inputs.until_met(name for names, _ in still for name in names)


def _change(inputs: PolicyInputs, names: Sequence[str]) -> float:
    """Return by what share the importance of a block has changed; inf if this is unknown."""
    known = [name for name in names if name in inputs.importance and name in inputs.earlier]
    before = sum(inputs.earlier[name] for name in known)
    return abs(before - sum(inputs.importance[name] for name in known)) / before if before > 0 else math.inf
