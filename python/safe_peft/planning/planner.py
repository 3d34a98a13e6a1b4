"""Learns the shape of the batches from a training, and turns bytes into decisions of the freezer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import nn

from ..config import SafeConfig
from ..errors import PlanError
from ..state import Planned
from .budget import Choice, bytes_limit, fit
from .fakes import FakeModel
from .inputs import Inputs
from .memory import plan_of
from .plan import MemoryPlan
from .retained import RetainedTable
from .seen import Seen, order
from .tracing import Trace, trace

logger = logging.getLogger(__name__)

ATTEMPTS = 4


class Planner:
    """Plans for the largest batch that the training has shown so far.

    Args:
        model: the model that trains; a copy without values is made of it before anything freezes.
        config: the options.
        others_train: something but the adapters trains.
        shared: other processes see other batches; what they have agreed on decides, see `agree`.
    """

    def __init__(self, model: nn.Module, config: SafeConfig, others_train: bool, *, shared: bool = False) -> None:
        self.config, self.others_train = config, others_train
        self.planned = Planned()
        self._shared = shared
        self._model, self._refusal = _copy(model)
        if config.needs_plan and self._refusal is not None:
            raise self._refusal
        self._traces: dict[tuple[frozenset[str], frozenset[str]], Trace] = {}
        self.watched = Seen(model, exact=config.needs_plan, larger=self._larger)

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

    def load(self, planned: Planned) -> None:
        """Go on from what `planned` was, with what had been `seen`."""
        self.planned, self.watched.inputs, self._traces = planned, planned.seen, {}

    def _larger(self, seen: Inputs) -> None:
        if not self._shared:
            self._plan_for(seen)

    @property
    def mark(self) -> str:
        """Stands for the batch to plan for: as long as it is the same in every process there is nothing to agree on."""
        return repr(self.seen) if self.config.needs_plan and self._shared else ""

    def agree(self, seen: Sequence[Inputs | None]) -> None:
        """Plan for the largest batch of all processes from now on, so that they all decide the same.

        Args:
            seen: what each of them has `seen`.
        """
        self.watched.inputs = max((one for one in seen if one is not None), key=order, default=None)
        self._plan_for(self.seen)

    def _plan_for(self, inputs: Inputs | None) -> None:
        if inputs != self.planned.inputs:
            self.planned, self._traces = replace(self.planned, inputs=inputs), {}

    # ---------------------------------------------------------------- decisions

    def by_bytes(self, importance: Mapping[str, float], frozen: Collection[str], share: float) -> list[str]:
        """Return whom the curve says to freeze now when the target is a share of bytes: what is worth least a byte.

        Taking the least important first would often free nothing for long: one live adapter of the lowest layer keeps
        the whole graph.

        Args:
            importance: of those that may freeze.
            frozen: who is frozen.
            share: what `schedule.way` says.
        """
        if not self.ready:
            return []
        table, blocks = self._unfrozen(), self._blocks()
        saves = table.bytes() - table.bytes([*frozen, *importance], blocks)
        limit = table.bytes() - int((self.config.target_fraction or 0.0) * share * saves)
        keep_one, again = not self.others_train, "frozen" if blocks else "off"
        return list(fit(table, importance, limit, frozen=frozen, recompute=again, keep_one=keep_one).freeze)

    def fit(self, importance: Mapping[str, float], frozen: Collection[str], share: float) -> Choice:
        """Return what it takes to keep the next steps within the budget on its way down, checked by a trace.

        Args:
            importance: of those that may freeze.
            frozen: who is frozen, or about to be.
            share: what `schedule.way` says.
        """
        if not self.ready:
            return Choice((), (), 0, True)
        budget = self.config.memory_budget
        assert isinstance(budget, int)
        full = self._unfrozen().bytes()
        if full <= budget and self.config.recompute != "frozen":
            return Choice((), (), full, True)
        allowed = bytes_limit(full, budget, share)
        limit, table = allowed, self._trace(frozen).table
        for _ in range(ATTEMPTS):
            choice = fit(
                table,
                importance,
                limit,
                frozen=frozen,
                recompute=self.config.recompute,
                keep_one=not self.others_train,
            )
            found = self._trace([*frozen, *choice.freeze], choice.recompute).retained
            choice = replace(choice, bytes=found, fits=found <= allowed)
            if choice.fits or limit <= 0 or found <= limit:
                break
            limit -= found - allowed  # the table was a little too hopeful
        self._traces = {key: value for key, value in self._traces.items() if not key[0] or key[0] >= set(frozen)}
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
