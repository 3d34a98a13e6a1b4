"""Restores a model whose freezer was dropped, or whose training was interrupted, before `detach`.

Otherwise its adapters would stay frozen without dropout, and the next training would train fewer adapters.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..binding.adapters import LayerState
from ..binding.bind import Binding
from ..binding.class_swap import STATE
from ..distributed.wrappers import walk
from ..prefix.cache import PrefixCache
from .byte_planner import Planner
from .decisions import Decisions
from .enforcement import FreezeEnforcer
from .scorer import Scorer

logger = logging.getLogger(__name__)


@dataclass
class Standing:
    """The state of a freezer in its training.

    Args:
        attached: the freezer has hooks on the model.
        finished: the training has ended, and frozen adapters shall stay frozen.
        by_trainer: a Trainer's callback made the freezer.
    """

    attached: bool = True
    finished: bool = False
    by_trainer: bool = False


def restore_if_forgotten(
    freezer: Any,
    standing: Standing,
    hooked: Sequence[Scorer | Planner | PrefixCache],
    enforcer: FreezeEnforcer,
    decisions: Decisions,
    binding: Binding,
    *,
    alone: bool,
) -> None:
    """Remove the hooks from a model and make all adapters trainable when a freezer is garbage-collected.

    Args:
        freezer: the freezer.
        standing: the freezer's state.
        hooked: the parts that have hooks on the model.
        enforcer: restores the adapters.
        decisions: has the names of the frozen adapters.
        binding: the binding of the model.
        alone: no other process shares the training. Several processes would have to change at the same time.
    """
    binding._freezer = weakref.ref(freezer)
    weakref.finalize(freezer, _forgotten, standing, enforcer, decisions, binding, alone).atexit = False
    for part in hooked:  # runs before the rest: finalizers run in reverse order
        weakref.finalize(freezer, part.close).atexit = False


def _forgotten(
    standing: Standing, enforcer: FreezeEnforcer, decisions: Decisions, binding: Binding, alone: bool
) -> None:
    names = decisions.ledger.frozen
    if not standing.attached or standing.finished:
        return
    if not alone:
        if names:
            logger.warning(
                "a freezer was deleted before its training ended: %d adapters stay frozen. To let them train again, "
                "call safe_peft.bind(model).release(keep_frozen=False) in every process before DDP wraps the model.",
                len(names),
            )
        return
    enforcer.restore(names)
    binding.release()
    binding.detach()
    if names:
        logger.warning(
            "a freezer was deleted before its training ended, at step %d: its %d frozen adapters train again, with "
            "dropout. To keep adapters frozen, call freezer.detach(keep_frozen=True) first.",
            decisions.ledger.last_step,
            len(names),
        )


def take_over(model: nn.Module) -> bool:
    """Detach the freezer of an interrupted Trainer training, because a new training begins.

    Args:
        model: the model without wrappers.

    Returns:
        Whether such a freezer had frozen adapters; these train again now.
    """
    states = (module.__dict__.get(STATE) for _, module in walk(model))
    owners = (state.owner() for state in states if isinstance(state, LayerState) and state.owner is not None)
    freezer = next((freezer for owner in owners if owner is not None and (freezer := owner.freezer())), None)
    if freezer is None or not freezer.standing.by_trainer or freezer.standing.finished:
        return False
    frozen = freezer.frozen
    freezer.detach()
    logger.warning(
        "an earlier training of this model was interrupted; its freezer is detached, and its %d frozen adapters train "
        "again, with dropout.",
        len(frozen),
    )
    return bool(frozen)
