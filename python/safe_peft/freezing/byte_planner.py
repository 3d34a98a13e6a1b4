"""Learns the shape of the batches from a training, and turns bytes into decisions of the freezer."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import nn

from ..binding.adapters import Adapter
from ..errors import PlanError
from ..planning.fake_model import FakeModel
from ..planning.greedy import Choice, bytes_limit, fit
from ..planning.inputs import Inputs
from ..planning.measured import Measurement
from ..planning.memory import plan_of
from ..planning.plan import MemoryPlan
from ..planning.retained import Measured, RetainedTable
from ..planning.seen import Seen, order
from ..planning.sharded import check_sharding
from ..planning.tracing import Trace, trace
from .config import SafeConfig
from .schedule import rank
from .state import Planned

logger = logging.getLogger(__name__)

ATTEMPTS = 4
WAITS = 7
"""Steps to wait for a forward in which every adapter has run."""
Knowledge = tuple[Inputs | None, Measured | None, str | None]


class Planner:
    """Plans for the largest batch that the training has shown so far.

    A copy of the model without values says what a step retains. Where the model does not run without values, a forward
    of the training itself is measured; where neither can be, that is said at the first batch.

    Args:
        model: the model that trains; a copy without values is made of it before anything freezes.
        config: the options.
        others_train: something but the adapters trains.
        adapters: those of the model that train.
        shared: other processes see other batches; what they have agreed on decides, see `agree`.

    Attributes:
        refused: why nothing can be decided by bytes; None if it can.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SafeConfig,
        others_train: bool,
        adapters: Sequence[Adapter] = (),
        *,
        shared: bool = False,
    ) -> None:
        self.config, self.others_train = config, others_train
        self.planned = Planned()
        self.refused: str | None = None
        self._shared, self._adapters = shared, adapters
        self._whole = weakref.ref(model)
        if config.needs_plan:
            check_sharding(model)
        self._model, self._refusal = _copy(model)
        self._checked = self._measures = False
        self._waits = WAITS
        self._traces: dict[tuple[frozenset[str], frozenset[str]], Trace] = {}
        self.watched = Seen(model, exact=config.needs_plan, larger=self._larger, measure=self._measure)

    @property
    def ready(self) -> bool:
        """Whether a batch has been seen, and agreed on."""
        return self.planned.inputs is not None

    @property
    def seen(self) -> Inputs | None:
        """The largest step that this process has seen."""
        return self.watched.inputs

    def close(self) -> None:
        """Take the hooks off the model."""
        self.watched.close()

    def suspended(self) -> AbstractContextManager[None]:
        """Look away while the block runs."""
        return self.watched.suspended()

    def end_step(self) -> None:
        """Account for an optimizer step that is done. After the first it is known whether bytes can decide.

        Raises:
            PlanError: They cannot, and there is a budget.
        """
        self.watched.end_step()
        if self.config.needs_plan and not self._checked and self.seen is not None:
            self.refused = None  # the first batch of a compiled model is seen late: when a scoring step runs uncompiled
            self._check()
        if self.refused is not None and self.config.memory_budget is not None:
            raise PlanError(
                f"memory_budget cannot act: {self.refused}; leave it out and give a target_fraction, or make the batch "
                "smaller."
            )

    def load(self, planned: Planned) -> None:
        """Go on from what `planned` was, with what had been `seen`."""
        self.planned, self.watched.inputs, self._traces = planned, planned.seen, {}
        self.watched.measured = planned.measured
        self._checked = self._measures = planned.measured is not None
        self.refused = None

    def state(self) -> Planned:
        """Return what has to be remembered over a restart."""
        return replace(self.planned, seen=self.seen, measured=self.watched.measured if self._measures else None)

    def _measure(self, called: nn.Module, arguments: Any) -> Measurement | None:
        """Measure a forward before anything freezes, as long as it is not known that a trace is as good."""
        model = self._whole()
        wanted = self._measures or not self._checked
        if model is None or not self.config.needs_plan or not wanted or not self._adapters:
            return None
        if not all(adapter.trainable for adapter in self._adapters):
            return None
        return Measurement(model, self._adapters, called, arguments)

    def _larger(self, seen: Inputs) -> None:
        if not self._shared:
            self._plan_for(seen)

    @property
    def mark(self) -> str:
        """Stands for what this process plans by: as long as it is the same in all there is nothing to agree on."""
        return repr(self.knowledge) if self.config.needs_plan and self._shared else ""

    @property
    def knowledge(self) -> Knowledge:
        """What this process plans by: the batch, what was measured, and why nothing can be decided."""
        return self.seen, self.watched.measured if self._measures else None, self.refused

    def agree(self, known: Sequence[Knowledge]) -> None:
        """Plan for the largest batch of all processes from now on, so that they all decide the same.

        Args:
            known: the `knowledge` of each.
        """
        self.watched.inputs = max((seen for seen, _, _ in known if seen is not None), key=order, default=None)
        measured = [one for _, one, _ in known if one is not None]
        if measured:
            self._measures, self.watched.measured = True, max(measured, key=lambda one: one.elements)
        self.refused = next((why for _, _, why in known if why is not None), None)
        self._plan_for(self.seen)

    def _plan_for(self, inputs: Inputs | None) -> None:
        if inputs != self.planned.inputs:
            self.planned, self._traces = replace(self.planned, inputs=inputs), {}

    # ---------------------------------------------------------------- whether bytes can decide

    def _check(self) -> None:
        self._checked = True
        try:
            if not self._measures:
                self._trace()
        except PlanError as error:
            if self.watched.measured is None:
                return self._refuse(str(error))
            self._measures = True
            logger.info("%s Bytes are measured in the training's own forwards instead.", error)
        measured = self.watched.measured
        if self._measures and measured is not None and self._waits and not measured.table.is_complete():
            self._waits -= 1  # LayerDrop, for instance: the next forward may show what this one left out
            self._checked = False
            return None
        table, budget = self._unfrozen(), self.config.memory_budget
        may = dict.fromkeys(rank(self.config, dict.fromkeys(table.adapters, 1.0)), 1.0)
        least = self._fit(table, may, 0, ())
        full = table.bytes()
        if least.bytes >= full and (not isinstance(budget, int) or full > budget):
            return self._refuse(f"a step retains {full:,} bytes with all that may freeze frozen, as with nothing")
        if isinstance(budget, int) and full > budget and not self._measures:
            least = replace(least, bytes=self._trace(least.freeze, least.recompute).retained)
        if isinstance(budget, int) and least.bytes > budget and not self.planned.warned:
            self._warn(least, budget)
        return None

    def _refuse(self, why: str) -> None:
        self.refused = why
        if self.config.memory_budget is None:
            what = 'freeze_by="bytes" cannot act: %s. Adapters freeze by their number instead.'
            logger.warning(what, why.rstrip("."))

    def acts(self) -> bool:
        """Whether bytes decide; says it once if they do not."""
        if not self.ready and self.refused is None:
            self._refuse("no training batch was seen, since no forward of the model was called with tensors")
        elif self.refused is None:
            self._check_again()
        return self.refused is None

    def _check_again(self) -> None:
        """See that a plan of the largest batch, which may be other than the first in kind, is possible."""
        try:
            self._unfrozen()
        except PlanError as error:
            if self.watched.measured is None or self._shared:  # processes have measured different batches
                return self._refuse(str(error))
            self._measures = True

    def retained(self, frozen: Collection[str], recompute: Collection[str]) -> int | None:
        """Return the bytes that a step retains for backward; None if decisions do not depend on bytes.

        Args:
            frozen: the frozen adapters.
            recompute: blocks that run again in backward once they are frozen.
        """
        planned = self.config.needs_plan and self._checked and self.ready and self.acts()
        return self._unfrozen().bytes(frozen, recompute) if planned else None

    # ---------------------------------------------------------------- decisions

    def by_bytes(self, importance: Mapping[str, float], frozen: Collection[str], share: float) -> list[str]:
        """Return whom the curve says to freeze now when the target is a share of bytes: what is worth least a byte.

        Taking the least important first would often free nothing for long: one live adapter of the lowest layer keeps
        the whole graph.

        Args:
            importance: of those that may freeze.
            frozen: who is frozen.
            share: what `curves.way` says.
        """
        table, blocks = self._unfrozen(), self._blocks()
        # Not everything frozen: a norm whose readers are all frozen holds its input, which may be more than it frees.
        least = self._fit(table, importance, 0, frozen).bytes
        saves = table.bytes() - min(least, table.bytes([*frozen, *importance], blocks))
        limit = table.bytes() - int((self.config.target_fraction or 0.0) * share * saves)
        keep_one, again = not self.others_train, "frozen" if blocks else "off"
        return list(fit(table, importance, limit, frozen=frozen, recompute=again, keep_one=keep_one).freeze)

    def fit(self, importance: Mapping[str, float], frozen: Collection[str], share: float) -> Choice:
        """Return what it takes to keep the next steps within the budget on its way down, checked by a trace.

        Args:
            importance: of those that may freeze.
            frozen: who is frozen, or about to be.
            share: what `curves.way` says.
        """
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
            limit -= found - allowed  # the table was a little too hopeful
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
            "memory_budget cannot be met: with all that may freeze frozen a step retains %s bytes, %s more than the %s "
            "allowed; make the batch smaller, allow recompute, or spare fewer adapters.",
            f"{choice.bytes:,}",
            f"{choice.bytes - budget:,}",
            f"{budget:,}",
        )
        self.planned = replace(self.planned, warned=True)

    def _blocks(self) -> list[str]:
        if self.config.recompute == "off":
            return []
        return [block.name for block in self._unfrozen().blocks]

    def _unfrozen(self) -> RetainedTable:
        measured, inputs = self.watched.measured, self.planned.inputs or self.seen
        if self._measures and measured is not None and inputs is not None:
            return measured.of(inputs.elements)
        return self._trace().table

    def _trace(self, frozen: Collection[str] = (), recompute: Collection[str] = ()) -> Trace:
        key = frozenset(frozen), frozenset(recompute)
        if key not in self._traces:
            model, inputs = self._known()
            keep = self.config.keep_dropout
            self._traces[key] = trace(model, inputs, frozen=frozen, recompute=recompute, keep_dropout=keep)
        return self._traces[key]

    def start_and_end(self, frozen: Sequence[str], recompute: Collection[str]) -> tuple[tuple[str, MemoryPlan], ...]:
        """Return the plan of a step with nothing frozen, and of one as it is now.

        Args:
            frozen: who is frozen now.
            recompute: blocks that run again in backward once they are frozen.

        Raises:
            PlanError: No batch has been seen, or the model does not run without values.
        """
        model, inputs = self._known()
        keep, again = self.config.keep_dropout, sorted(recompute)
        start = plan_of(model, inputs, keep_dropout=keep)
        return ("start", start), ("end", plan_of(model, inputs, frozen=frozen, recompute=again, keep_dropout=keep))

    def _known(self) -> tuple[nn.Module, Inputs]:
        if self._model is None:
            raise self._refusal or PlanError("this model cannot be planned.")
        inputs = self.planned.inputs or self.seen
        if inputs is None:
            raise PlanError("no training batch has been seen yet; train a step before planning.")
        return self._model, inputs


def _copy(model: nn.Module) -> tuple[nn.Module | None, PlanError | None]:
    try:
        return FakeModel(model).module, None
    except PlanError as error:
        return None, error
