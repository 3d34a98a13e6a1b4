"""What becomes of a model whose freezer was forgotten, or whose training was interrupted, before anything was detached.

Its adapters would stay frozen, their dropout off, and the next training would go on with fewer of them.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..binding.adapters import LayerState
from ..binding.bind import Binding
from ..binding.class_swap import STATE
from ..distributed.wrappers import walk
from .byte_planner import Planner
from .decisions import Decisions
from .enforcement import Holding
from .scorer import Scorer

logger = logging.getLogger(__name__)


@dataclass
class Standing:
    """Where a freezer stands in its training.

    Args:
        attached: it has hooks on the model.
        finished: the training is over, and what is frozen is meant to be.
        by_trainer: a Trainer's callback made it.
    """

    attached: bool = True
    finished: bool = False
    by_trainer: bool = False


def restore_if_forgotten(
    freezer: Any,
    standing: Standing,
    scorer: Scorer,
    planner: Planner,
    holding: Holding,
    decisions: Decisions,
    binding: Binding,
    *,
    alone: bool,
) -> None:
    """Take the hooks off a model, and have everything train again, once nothing refers to a freezer any longer.

    Args:
        freezer: the freezer.
        standing: its.
        scorer: has hooks on the model.
        planner: likewise.
        holding: carries out the freezer's decisions.
        decisions: which those are.
        binding: of its model.
        alone: no other process shares the training; engines of several have to follow every change at the same time.
    """
    binding._freezer = weakref.ref(freezer)
    weakref.finalize(freezer, _forgotten, standing, holding, decisions, binding, alone).atexit = False
    for part in (scorer, planner):  # before the rest: the last comes first
        weakref.finalize(freezer, part.close).atexit = False


def _forgotten(standing: Standing, holding: Holding, decisions: Decisions, binding: Binding, alone: bool) -> None:
    names = decisions.ledger.frozen
    if not standing.attached or standing.finished:
        return
    if not alone:
        if names:
            logger.warning(
                "a freezer was forgotten in the middle of its training: %d adapters stay frozen. To let them train "
                "again, call safe_peft.bind(model).release(keep_frozen=False) in every process before DDP wraps the "
                "model.",
                len(names),
            )
        return
    holding.restore(names)
    binding.release()
    binding.detach()
    if names:
        logger.warning(
            "a freezer was forgotten in the middle of its training, at step %d: the %d adapters that it had frozen "
            "train again, with their dropout. To keep them frozen, call freezer.detach(keep_frozen=True).",
            decisions.ledger.last_step,
            len(names),
        )


def take_over(model: nn.Module) -> bool:
    """Detach the freezer of a Trainer's training that was interrupted, since another training begins.

    Args:
        model: without wrappers.

    Returns:
        Whether there was one that had frozen adapters, which train again now.
    """
    states = (module.__dict__.get(STATE) for _, module in walk(model))
    owners = (state.owner() for state in states if isinstance(state, LayerState) and state.owner is not None)
    freezer = next((freezer for owner in owners if owner is not None and (freezer := owner.freezer())), None)
    if freezer is None or not freezer.standing.by_trainer or freezer.standing.finished:
        return False
    frozen = freezer.frozen
    freezer.detach()
    logger.warning(
        "an earlier training of this model was interrupted; its freezer is detached, and the %d adapters that it had "
        "frozen train again, with their dropout.",
        len(frozen),
    )
    return bool(frozen)
