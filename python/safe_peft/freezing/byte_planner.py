"""Records the shape of the batches in a training, and decides by bytes for the freezer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..binding.adapters import Adapter
from ..binding.class_swap import saves_by_hooks
from ..errors import PlanError
from ..planning.fake_model import FakeModel, check_sharding
from ..planning.greedy import Choice, bytes_limit, fit
from ..planning.inputs import Inputs
from ..planning.memory import plan_of
from ..planning.plan import MemoryPlan
from ..planning.retained import Measured, RetainedTable
from ..planning.seen import Measurement, Seen, order
from ..planning.tracing import Trace, trace
from .config import SafeConfig
from .policies import PolicyInputs, choose_by
from .schedule import rank
from .state import Planned

logger = logging.getLogger(__name__)

ATTEMPTS = 4
WAITS = 7
"""Maximum number of steps to wait for a forward that runs every adapter."""
Made = TypeVar("Made")
Knowledge = tuple[Inputs | None, Measured | None, str | None]


class Planner:
    """Plans for the largest batch of the training so far.

    A copy of the model without values computes the bytes that a step retains. If the model does not run without values,
    a forward of the training is measured. If both fail, a warning or an error follows after the first batch.

    If the training is `shared`, other processes have other batches, and decisions use the batch they agreed on, see
    `agree`. `refused` is the reason why decisions by bytes are impossible; None if they are possible.
    """

    def __init__(
        self, model: nn.Module, config: SafeConfig, others_train: bool, adapters: Sequence[Adapter], *, shared: bool
    ) -> None:
        self.config, self.others_train = config, others_train
        self.planned = Planned()
        self.refused: str | None = None
        self._shared, self._adapters = shared, adapters
        self._whole = weakref.ref(model)
        self._sharding = _attempt(lambda: check_sharding(model)) if config.needs_plan else None
        if self._sharding is not None and config.memory_budget is not None:
            raise self._sharding
        self._copy = _attempt(lambda: FakeModel(model).module)
        self._checked = self._measures = False
        self._waits = WAITS
        self._traces: dict[tuple[frozenset[str], frozenset[str]], Trace] = {}
        self.watched = Seen(model, exact=config.needs_plan, larger=self._larger, measure=self._measure)

    @property
    def seen(self) -> Inputs | None:
        """The largest batch in this process."""
        return self.watched.inputs

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.watched.close()

    def suspended(self) -> AbstractContextManager[None]:
        """Record no batches inside the block."""
        return self.watched.suspended()

    def end_step(self) -> None:
        """Finish an optimizer step. The first step checks whether bytes can be planned; a memory budget requires it."""
        self.watched.end_step()
        if self.config.needs_plan and not self._checked and self.seen is not None:
            # The first batch of a compiled model is seen in the first scoring step, which runs eagerly.
            self.refused = None
            self._check()
        if self.refused is not None and self.config.memory_budget is not None:
            raise PlanError(
                f"memory_budget cannot be used: {self.refused}; pass a target_fraction instead, or make the batch "
                "smaller."
            )

    def load(self, planned: Planned) -> None:
        """Continue from a saved state."""
        self.planned, self.watched.inputs, self._traces = planned, planned.seen, {}
        self.watched.measured = planned.measured
        self._checked = self._measures = planned.measured is not None
        self.refused = None

    def state(self) -> Planned:
        """Return the state that is needed after a restart."""
        return replace(self.planned, seen=self.seen, measured=self.watched.measured if self._measures else None)

    def _measure(self, called: nn.Module, arguments: Any) -> Measurement | None:
        """Measure a forward before any adapter freezes, unless a trace is known to work."""
        model = self._whole()
        wanted = self._measures or not self._checked
        if model is None or not self.config.needs_plan or not wanted or saves_by_hooks():
            return None
        if not all(adapter.trainable for adapter in self._adapters):
            return None
        return Measurement(model, self._adapters, called, arguments)

    def _larger(self, seen: Inputs) -> None:
        if not self._shared:
            self._plan_for(seen)

    @property
    def mark(self) -> str:
        """A text form of `knowledge`. While it is equal in all processes, they need not call `agree`."""
        return repr(self.knowledge) if self.config.needs_plan and self._shared else ""

    @property
    def knowledge(self) -> Knowledge:
        """The inputs of this process's plans: the batch, the measured bytes, and the reason if there is no plan."""
        return self.seen, self.watched.measured if self._measures else None, self.refused

    def agree(self, known: Sequence[Knowledge]) -> None:
        """Plan for the largest batch of all processes from now on, so all make the same decisions."""
        self.watched.inputs = max((seen for seen, _, _ in known if seen is not None), key=order, default=None)
        measured = [one for _, one, _ in known if one is not None]
        if measured:
            self._measures, self.watched.measured = True, max(measured, key=lambda one: one.elements)
        self.refused = next((why for _, _, why in known if why is not None), None)
        self._plan_for(self.seen)

    def _plan_for(self, inputs: Inputs | None) -> None:
        if inputs != self.planned.inputs:
            self.planned, self._traces = replace(self.planned, inputs=inputs), {}

    # ---------------------------------------------------------------- whether decisions by bytes are possible

    def _check(self) -> None:
        self._checked = True
        if self._sharding is not None:
            return self._refuse(str(self._sharding))
        if not self._measures and not self._plans(may_measure=True):
            return None
        measured = self.watched.measured
        if self._measures and measured is not None and self._waits and not measured.table.is_complete():
            self._waits -= 1  # for example with LayerDrop: the next forward may run the layers that this one skipped
            self._checked = False
            return None
        table, budget = self._unfrozen(), self.config.memory_budget
        may = dict.fromkeys(rank(self.config, dict.fromkeys(table.adapters, 1.0)), 1.0)
        least = self._fit(table, may, 0, ())
        full = table.bytes()
        if least.bytes >= full and (not isinstance(budget, int) or full > budget):
            return self._refuse(f"freezing saves nothing: a step retains {full:,} bytes even if all adapters freeze")
        if isinstance(budget, int) and full > budget and not self._measures:
            least = replace(least, bytes=self._trace(least.freeze, least.recompute).retained)
        if isinstance(budget, int) and least.bytes > budget and not self.planned.warned:
            self._warn(least, budget)
        return None

    def _refuse(self, why: str) -> None:
        self.refused = why
        if self.config.policy != "greedy":
            raise PlanError(f'policy: {self.config.policy!r} cannot be used: {why.rstrip(".")}; choose "greedy".')
        if self.config.memory_budget is None:
            what = 'freeze_by="bytes" cannot be used: %s. Adapters freeze by number instead.'
            logger.warning(what, why.rstrip("."))

    def acts(self) -> bool:
        """Whether decisions are made by bytes; warns once if they are not."""
        if self.planned.inputs is None and self.refused is None:
            self._refuse("the training batch is unknown: no forward in training mode received tensors")
        elif self.refused is None:
            self._plans(may_measure=not self._shared)  # processes have measured different batches
        return self.refused is None

    def _plans(self, *, may_measure: bool) -> bool:
        """Whether a table of the largest batch can be traced, or else was measured; if not, bytes cannot be used.

        Every larger batch is checked again, because it may run code that the first one did not.
        """
        try:
            self._unfrozen()
        except PlanError as error:
            if self.watched.measured is None or not may_measure:
                self._refuse(str(error))
                return False
            self._measures = True
            logger.info("%s Bytes are measured in the training's own forwards instead.", error)
        return True

    def retained(self, frozen: Collection[str], recompute: Collection[str]) -> int | None:
        """Return the bytes that a step retains for backward; None if decisions do not depend on bytes."""
        planned = self.config.needs_plan and self._checked and self.planned.inputs is not None and self.acts()
        return self._unfrozen().bytes(frozen, recompute) if planned else None

    # ---------------------------------------------------------------- decisions

    def by_bytes(
        self, importance: Mapping[str, float], frozen: Sequence[str], share: float, earlier: Mapping[str, float]
    ) -> list[str]:
        """Choose the adapters to freeze now for a target of bytes, by the policy from the options.

        Freezing the least important first often frees nothing for a long time: one live adapter in the lowest layer
        keeps the whole graph.
        """
        table = self._unfrozen()
        blocks = [block.name for block in table.blocks if self.config.recompute != "off"]
        # Freezing everything is not always the minimum: a norm whose readers are all frozen retains its own input.
        least = self._fit(table, importance, 0, frozen).bytes
        saves = table.bytes() - min(least, table.bytes([*frozen, *importance], blocks))
        limit = table.bytes() - int((self.config.target_fraction or 0.0) * share * saves)
        seed, keep_one = self.config.seed, not self.others_train
        inputs = PolicyInputs(importance, table, limit, share, frozen, earlier, seed, blocks, keep_one)
        return choose_by(self.config.policy, inputs)

    def fit(self, importance: Mapping[str, float], frozen: Collection[str], share: float) -> Choice:
        """Choose adapters and blocks that keep the next steps within the falling limit; a trace checks the choice."""
        if not self.acts():
            return Choice((), (), 0, True)
        budget = self.config.memory_budget
        assert isinstance(budget, int)
        full = self._unfrozen().bytes()
        if full <= budget and self.config.recompute != "frozen":
            return Choice((), (), full, True)
        allowed = bytes_limit(full, budget, share)
        if self._measures:
            return self._settle(self._fit(self._unfrozen(), importance, allowed, frozen), share, budget)
        limit, table = allowed, self._trace(frozen).table
        for _ in range(ATTEMPTS):
            choice = self._fit(table, importance, limit, frozen)
            found = self._trace([*frozen, *choice.freeze], choice.recompute).retained
            choice = replace(choice, bytes=found, fits=found <= allowed)
            if choice.fits or limit <= 0 or found <= limit:
                break
            limit -= found - allowed  # the table's estimate was slightly too low
        self._traces = {key: value for key, value in self._traces.items() if not key[0] or key[0] >= set(frozen)}
        return self._settle(choice, share, budget)

    def _fit(
        self, table: RetainedTable, importance: Mapping[str, float], limit: int, frozen: Collection[str]
    ) -> Choice:
        again, keep_one = self.config.recompute, not self.others_train
        return fit(table, importance, limit, frozen=frozen, recompute=again, keep_one=keep_one)

    def _settle(self, choice: Choice, share: float, budget: int) -> Choice:
        if not choice.fits and share >= 1.0 and not self.planned.warned:
            self._warn(choice, budget)
        self.planned = replace(self.planned, recompute=choice.recompute)
        return choice

    def _warn(self, choice: Choice, budget: int) -> None:
        logger.warning(
            "memory_budget cannot be met: with all permitted adapters frozen a step retains at least %s allowed; make "
            "the batch smaller, allow recompute, or list fewer adapters in never_freeze.",
            f"{choice.bytes:,} bytes, {choice.bytes - budget:,} more than the {budget:,}",
        )
        self.planned = replace(self.planned, warned=True)

    def _unfrozen(self) -> RetainedTable:
        measured, inputs = self.watched.measured, self.planned.inputs or self.seen
        if self._measures and measured is not None and inputs is not None:
            return measured.of(inputs.elements)
        return self._trace().table

    def _trace(self, frozen: Collection[str] = (), recompute: Collection[str] = ()) -> Trace:
        key = frozenset(frozen), frozenset(recompute)
        if key not in self._traces:
            self._traces[key] = trace(
                *self._known(),
                frozen=frozen,
                recompute=recompute,
                keep_dropout=self.config.keep_dropout,
                backward=False,  # decisions do not need the peak
            )
        return self._traces[key]

    def start_and_end(self, frozen: Sequence[str], recompute: Collection[str]) -> tuple[tuple[str, MemoryPlan], ...]:
        """Return the plan of a step without frozen adapters, and of a step in the current state."""
        model, inputs = self._known()
        keep, again = self.config.keep_dropout, sorted(recompute)
        start = plan_of(model, inputs, keep_dropout=keep)
        return ("start", start), ("end", plan_of(model, inputs, frozen=frozen, recompute=again, keep_dropout=keep))

    def _known(self) -> tuple[nn.Module, Inputs]:
        if isinstance(self._copy, PlanError):
            raise self._copy
        if (inputs := self.planned.inputs or self.seen) is None:
            raise PlanError("the training batch is not known yet; train one step before planning.")
        return self._copy, inputs


def _attempt(make: Callable[[], Made]) -> Made | PlanError:
    try:
        return make()
    except PlanError as error:
        return error
