"""Restores a model whose freezer was dropped, or whose training was interrupted, before `detach`.

Otherwise its adapters would stay frozen without dropout, and the next training would train fewer adapters.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..binding.adapters import LayerState
from ..binding.bind import Binding
from ..binding.class_swap import STATE
from ..distributed.wrappers import walk
from .decisions import Decisions
from .enforcement import FreezeEnforcer

logger = logging.getLogger(__name__)


@dataclass
class Standing:
    """The state of a freezer in its training; it outlives the freezer.

    Args:
        hooks: removes the freezer's hooks from the model.
        undo: does the same, and unbinds the model.
        alone: no other process shares the training. Several processes would have to change at the same time.
        attached: the freezer has hooks on the model.
        finished: the training has ended, and frozen adapters must stay frozen.
        by_trainer: a Trainer's callback made the freezer.
    """

    hooks: ExitStack
    undo: ExitStack
    enforcer: FreezeEnforcer
    decisions: Decisions
    alone: bool
    attached: bool = True
    finished: bool = False
    by_trainer: bool = False

    def follow(self, freezer: Any, binding: Binding) -> None:
        """Restore the model when the freezer is garbage-collected."""
        binding._freezer = weakref.ref(freezer)
        weakref.finalize(freezer, self._forgotten).atexit = False

    def _forgotten(self) -> None:
        self.hooks.close()
        ledger = self.decisions.ledger
        count = len(ledger.frozen)
        if not self.attached or self.finished:
            return
        what = (
            f"{count} adapters stay frozen. To let them train again, call safe_peft.bind(model).release("
            "keep_frozen=False) in every process before DDP wraps the model."
        )
        if self.alone:
            self.enforcer.restore(ledger.frozen)
            self.undo.close()
            what = (
                f"its {count} frozen adapters train again, with dropout. To keep adapters frozen, call "
                "freezer.detach(keep_frozen=True) first."
            )
        if count:
            why = "a freezer was deleted before its training ended, at step %d: %s"
            logger.warning(why, ledger.last_step, what)


def take_over(model: nn.Module) -> bool:
    """Detach the freezer of an interrupted Trainer training; return whether adapters that it had frozen train again."""
    states = (module.__dict__.get(STATE) for _, module in walk(model))
    owners = (state.owner() for state in states if isinstance(state, LayerState) and state.owner is not None)
    freezer = next((freezer for owner in owners if owner is not None and (freezer := owner.freezer())), None)
    if freezer is None or not freezer.standing.by_trainer or freezer.standing.finished:
        return False
    count = len(freezer.frozen)
    freezer.detach()
    logger.warning(
        "an earlier training of this model was interrupted; its freezer is detached, and its %d frozen adapters train "
        "again, with dropout.",
        count,
    )
    return count > 0
