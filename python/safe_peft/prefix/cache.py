"""Skips the frozen blocks at the bottom of a stack for samples whose output is known.

The cut is the input of the lowest block that trains. Below it nothing changes, so this input is the same for a sample
in every epoch, unless something random happens below. It is kept, and later forwards run the blocks below the cut only
for the samples that are not known. If the cut has moved up, a known sample continues from the highest block whose input
is kept.

A sample is found by its content at the first block: its hidden states, its row of the mask, and all other arguments. No
dataset has to be changed, and padding and the order of samples may differ between epochs.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..binding.blocks.checkpointing import before_blocks
from ..binding.blocks.stack import Block, stacks
from ..binding.blocks.trains import trains
from ..binding.class_swap import STATE
from ..binding.forward_hooks import Call, Watcher, attention_masks, named_arguments
from .forward import Plan, generators
from .stack import Prefix
from .store import Store

logger = logging.getLogger(__name__)

CHECK_EVERY = 16
"""Forwards between two checks that a kept value is still what the blocks compute."""
LEAST_HITS = 0.05
"""With less than this share of known samples, the cache gives up once it is full."""
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class Usage:
    """Counts of the cache's use.

    Attributes:
        samples: samples in training forwards with a frozen prefix.
        known: samples for which at least one block was skipped.
        skipped: by block, the tokens for which it was skipped.
        reason: why the latest forward did not use the cache; "" if it did.
    """

    samples: int = 0
    known: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    reason: str = ""


class PrefixCache:
    """The cache of one bound model, for all its stacks.

    With `dropout`, the model's own dropout stays on below the cut; if the model has any there, nothing is kept.
    """

    def __init__(self, model: nn.Module, store: Store, *, dropout: bool = True) -> None:
        self.store, self.usage, self.dropout = store, Usage(), dropout
        self._told: set[str] = set()
        self._quieted: list[nn.Module] = []
        self._states: list[Block] = []
        self._gave_up = False
        self._late = (0, 0)  # samples, and known samples, since the store is full
        self.forwards = 0
        found = stacks(model)
        for number, stack in enumerate(found):
            prefix = Prefix(self, number, stack)
            for block in stack.values():
                if isinstance(state := block.__dict__.get(STATE), Block):
                    state.prefix = prefix
                    self._states.append(state)
        every = [block for stack in found for block in stack.values()]
        self._first = every[:1]
        self.before = before_blocks(model, every)
        self._watcher = Watcher(model, self._begin, self._end)

    def close(self) -> None:
        """Run all blocks again, and free the store."""
        self._watcher.close()
        self._restore()
        for state in self._states:
            state.prefix = None
        self._states.clear()
        self.store.close()

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context in which all blocks run, and nothing is kept."""
        return self._watcher.suspended()

    def metrics(self) -> dict[str, float]:
        """Return the share of known samples, and the bytes in use, for a logger."""
        share = self.usage.known / max(self.usage.samples, 1)
        return {"safe/prefix_known": share, "safe/prefix_bytes": float(self.store.bytes)}

    @property
    def current(self) -> Call | None:
        """The running forward, if it is one that trains."""
        call = self._watcher.current
        trains = call is not None and call.notes.get("trains", False) and torch._C._current_graph_task_id() == -1
        return call if trains else None

    @property
    def checks(self) -> bool:
        """Whether this forward computes a known sample again, and compares it."""
        return self.forwards % CHECK_EVERY == 1

    def refuse(self, reason: str) -> None:
        """Record why a forward does not use the cache; log each reason once."""
        self.usage.reason = reason
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("prefix_cache is not used: %s.", reason)

    def count(self, samples: int, known: int) -> None:
        """Count the samples of a forward; give up if the store is full and hardly any sample is known."""
        usage = self.usage
        usage.samples, usage.known, usage.reason = usage.samples + samples, usage.known + known, ""
        if not self.store.is_full:
            return
        self._late = (self._late[0] + samples, self._late[1] + known)
        epochs = self._late[0] * LEAST_HITS / max(1, len(self.store))  # two, if the store holds this share of an epoch
        if epochs >= 2 and self._late[1] < LEAST_HITS * self._late[0]:
            self._gave_up = True
            self.store.close()
            self.refuse("it is full, and hardly any sample comes again; samples may be changed at random")

    # ---------------------------------------------------------------- forwards

    def _begin(self, call: Call, args: tuple[Any, ...], kwargs: Any) -> None:
        given, notes = named_arguments(call.module, args, kwargs), call.notes
        masks = list(attention_masks(given))
        own = getattr(call.module, "config", None)
        on = {name: getattr(own, name, False) if given.get(name) is None else given[name] for name in _OUTPUTS}
        asked = [f"{name} is on" for name in _OUTPUTS if on[name]]
        if call.outer is not None and "trains" in (outer := call.outer.notes):
            notes |= {name: outer[name] for name in ("trains", "usable", "random")}
            notes |= {"masks": masks or outer["masks"], "asked": asked or outer["asked"]}
            return
        self._restore()  # an interrupt may have ended the last forward without `_end`
        notes["trains"] = torch.is_grad_enabled() and call.module.training and call.task == -1
        notes["usable"] = notes["trains"] and not self._watcher.is_suspended and not self._gave_up
        notes |= {"masks": masks, "asked": asked, "outermost": True}
        notes["random"] = generators() if notes["usable"] else ()  # evaluation does not pay for it
        if notes["usable"]:
            self.forwards += 1
        if call.module.training and call.task == -1:
            self._quiet_before()

    def _end(self, call: Call, output: Any, died: bool) -> None:
        if call.notes.get("outermost"):
            self._restore()
        for plan in (plan for plan in call.notes.values() if isinstance(plan, Plan) and not died):
            if plan.waiting:
                plan.reason = f"the blocks below {plan.name} were not all called"
            plan.require_exact()

    def _quiet_before(self) -> None:
        """Switch off dropout before the first block, if the first stack has a frozen prefix."""
        if not self.dropout and not self.before_trains() and not any(map(trains, self._first)):
            self._quieted = [module for module in self.before if module.training]
            for module in self._quieted:
                module.training = False

    def before_trains(self) -> bool:
        """Whether something before the first block trains, such as embeddings."""
        return any(p.requires_grad for module in self.before for p in module._parameters.values() if p is not None)

    def _restore(self) -> None:
        for module in self._quieted:
            module.training = True
        self._quieted = []
