"""Observe, score, raise the threshold, freeze: the method, one optimizer step at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from ..binding.adapters import Adapter
from ..binding.bind import bind
from ..distributed import Engine
from ..distributed.wrappers import trains_besides, unwrap
from ..errors import BindingError, SafeError, StateError
from ..files import jsonio
from ..files.checkpoints import fingerprints
from ..report.records import AdapterRecord
from ..report.report import FreezeReport
from .byte_planner import Planner
from .compile_support import EagerForwards
from .config import SafeConfig, check_int
from .decisions import Decisions
from .enforcement import Holding
from .forgotten import Standing, restore_if_forgotten
from .ledger import Ledger
from .nonfinite import NonFinite
from .optimizer_state import Optimizers
from .presence import Presence
from .schedule import check_fit, is_scoring_step, resolve
from .scorer import Scorer
from .state import FILES, Owner, Saved, check_state, state_of

logger = logging.getLogger(__name__)


class AdapterFreezer:
    """Scores a model's adapters while it trains, and freezes the least important ones for good.

    It binds the model in place; the model object stays what it is. Call `step` after every optimizer step. Adapters
    that do not train when it is made are left alone.

    Args:
        model: a PEFT model, or what holds one or several.
        optimizer: the one that trains it; wrappers such as accelerate's are looked through. Where parameters have
            optimizers of their own, all of them.
        config: the options, or a dict of them.
        total_steps: optimizer steps of the whole training; needed if an option is a share of it.
        first_step: optimizer steps that were done before.
        process_group: the processes that share the batch and decide together; None finds them: DDP's own group, FSDP2's
            mesh, or else all there are. Each of them makes its freezer after the model is wrapped.

    Raises:
        BindingError: The model has no adapter that trains, has a freezer already, is not what the optimizer trains, or
            is trained by an engine that cannot follow; or another process differs.
        ConfigError: An option cannot work with this model.

    Example:
        >>> freezer = AdapterFreezer(model, optimizer, SafeConfig(), total_steps=len(loader))  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     freezer.step()
        >>> freezer.report().save_html("report.html"); freezer.detach()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        config: SafeConfig | Mapping[str, Any] | None = None,
        *,
        total_steps: int | None = None,
        first_step: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.config = SafeConfig.of(config)
        self.model = unwrap(model)
        self._optimizers = Optimizers(optimizer)
        self._step = first_step = check_int("first_step", first_step, least=0)
        self._nonfinite = NonFinite(self.config)
        self._engine, self._first_forward = Engine(self.model, model, process_group), EagerForwards()
        with ExitStack() as undo:
            try:
                self._make(model, total_steps, undo)
            except SafeError as error:
                self._engine.require_same(error)
                raise
            same = {"config": self.config.to_dict(), "adapters": list(self._traits), "schedule": str(self.schedule)}
            self._engine.require_same({**same, "first_step": first_step})
            self._arm()
            undo.pop_all()
        if self.config.recompute == "frozen":
            self.binding.recompute.update(self.binding.blocks)
        self.standing = Standing()
        parts = (self._scorer, self.planner, self._holding, self._decisions, self.binding)
        restore_if_forgotten(self, self.standing, *parts, alone=self._engine.alone)

    def _make(self, model: nn.Module, total_steps: int | None, undo: ExitStack) -> None:
        """All that may fail in one process alone."""
        for one in self._optimizers.given:
            self._engine.check(one)
        self.schedule = resolve(self.config, total_steps)
        self.binding = bind(model)
        undo.callback(self.binding.detach)
        self._adapters = self.binding.claim()
        undo.callback(self.binding.release)
        self._presence = Presence(self.model, self._adapters)
        self._records = tuple(AdapterRecord(a.name, sum(p.numel() for p in a.parameters())) for a in self._adapters)
        self._traits = {adapter.name: adapter.traits() for adapter in self._adapters}
        self._optimizers.check(self._adapters)
        own = [p for adapter in self._adapters for p in adapter.parameters()]
        others_train, names = trains_besides(self.model, own), list(self._traits)
        check_fit(self.config, names, others_train)
        self.planner = Planner(self.model, self.config, others_train, self._adapters, shared=not self._engine.alone)
        undo.callback(self.planner.close)
        self._decisions = Decisions(self.config, self.schedule, self.planner, len(names), others_train)
        self._scorer = Scorer(self.model, self._optimizers.inner, self._adapters, self.config, self._engine)
        undo.callback(self._scorer.close)
        self._holding = Holding(self._adapters, self.binding, self._optimizers, self._engine, self.config)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Every adapter this freezer decides about, in the model's order."""
        return tuple(self._adapters)

    @property
    def ledger(self) -> Ledger:
        """Who was scored and frozen when."""
        return self._decisions.ledger

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the adapters frozen so far, in the order in which they were."""
        return self.ledger.frozen

    @property
    def unscored(self) -> tuple[str, ...]:
        """Adapters the latest scoring could tell no importance of; these are never frozen."""
        return tuple(name for name, value in self.ledger.importance.items() if not math.isfinite(value))

    def step(self) -> tuple[str, ...]:
        """Account for one optimizer step that is done: finish a scoring step, and freeze if the schedule says so.

        Call it after `optimizer.step()`, before or after `zero_grad()`, once per optimizer step.

        Returns:
            The names of the adapters frozen now; what they retained is gone from the next forward on.

        Raises:
            BindingError: The freezer is detached, or PEFT has deleted an adapter or unloaded the model.
            ScoreError: NaN or Inf reached a score, and `on_nonfinite` is "raise". The step is accounted for all the
                same, so that the freezer may go on being used.
        """
        self._check_attached()
        self._engine.check_step()
        self._first_forward.end()
        self._step += 1
        self.standing.finished = self._step >= (self.schedule.total_steps or math.inf)
        error = None
        self.planner.end_step()
        self._holding.hold(self.ledger.frozen)
        if self._scorer.armed and not self._scorer.ready:
            self._nonfinite.note_postponed(self._step)
        elif self._scorer.armed:
            importance = self._measure()
            error = self._nonfinite.note(self._step, importance, self._scorer.broken)
            self._decisions.record(self._step, importance)
        self._decisions.end_warmup(self._step)
        names = self._freeze_due()
        self._arm()
        if error is not None:
            raise error
        return names

    def _measure(self) -> dict[str, float]:
        """Score over all processes: what one of them alone has seen decides nothing."""
        where = f"{self._step} {self.ledger.frozen}"
        importance, other_batch = self._scorer.measure(same=where, batch=self.planner.mark)
        known = self.planner.knowledge
        self.planner.agree(self._engine.gather(known) if other_batch else [known])
        return importance

    def _check_attached(self) -> None:
        if not self.standing.attached:
            raise BindingError("this freezer is detached; make a new AdapterFreezer to go on.")
        self._presence.check()

    def _freeze_due(self) -> tuple[str, ...]:
        names, recompute = self._decisions.due(self._step)
        self._holding.freeze(names)
        self._holding.recompute(recompute)
        if names:
            logger.info("step %d: froze %d adapters, %d in all", self._step, len(names), len(self.ledger.frozen))
        return names

    def _arm(self, due: bool = False) -> None:
        """Prepare the coming step; a scoring step that is `due` had nothing to go by before."""
        frozen = set(self.ledger.frozen)
        live = [index for index, adapter in enumerate(self._adapters) if adapter.name not in frozen]
        if due or self._scorer.armed or is_scoring_step(self.schedule, self._step + 1):
            self._scorer.arm(live, shift=len(self.ledger.scorings))

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Score nothing inside the block, for forwards in training mode that are not training.

        Example:
            >>> with freezer.suspended():  # doctest: +SKIP
            ...     reference = model(**other_batch)
        """
        with self._scorer.observation.suspended(), self.planner.suspended():
            yield

    def metrics(self) -> dict[str, float]:
        """Return where the method stands, as finite numbers named `safe/*`, for a logger.

        Example:
            >>> freezer.metrics()["safe/frozen"]  # doctest: +SKIP
            27.0
        """
        return self.ledger.metrics(self._step, len(self._adapters))

    def report(
        self, model: str | None = None, retained: Sequence[tuple[int, int]] = (), *, memory: bool = False
    ) -> FreezeReport:
        """Return what happened so far.

        Args:
            model: what was trained, for people to read; None takes the name in the model's own config.
            retained: pairs of (optimizer step, bytes retained by a forward from that step on), if they were measured.
            memory: plan where each byte of a step goes, at the start and now; takes seconds for a large model.

        Raises:
            PlanError: `memory` is asked for, and no batch has been seen or the model does not run without values.
            BindingError: `memory` is asked for, and PEFT has deleted an adapter or unloaded the model.

        Example:
            >>> freezer.report().save_json("report.json")  # doctest: +SKIP
        """
        if memory:
            self._presence.check()
        own = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        return FreezeReport(
            model=model or own,
            config=self.config.to_dict(),
            total_steps=max(self.schedule.total_steps or 0, self._step),
            adapters=self._records,
            scorings=tuple(self.ledger.scorings),
            freezings=tuple(self.ledger.freezings),
            retained=tuple(retained),
            plans=self.planner.start_and_end(self.ledger.frozen, tuple(self.binding.recompute)) if memory else (),
        )

    def detach(self, keep_frozen: bool = False) -> None:
        """Take everything off the model and the optimizer again. Doing it twice does no harm; `report` goes on working.

        Args:
            keep_frozen: leave frozen adapters frozen, their dropout off; otherwise all train again as before. What the
                optimizer knew of them is gone in either case.
        """
        if not self.standing.attached:
            return
        self.standing.attached = False
        self._first_forward.end()
        self._scorer.close()
        self.planner.close()
        if not keep_frozen:
            self._holding.restore(self.ledger.frozen)
            self._engine.parameters_changed()
        self.binding.release()
        self.binding.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on after a restart, as JSON values.

        Example:
            >>> json.dumps(freezer.state_dict())  # doctest: +SKIP
        """
        evidence = replace(self._scorer.evidence(), process=self._engine.process)
        planned, total = self.planner.state(), self.schedule.total_steps
        return state_of(self._owner(), Saved(self._step, total, self.ledger, evidence, planned))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, and freeze again what was frozen: after the weights, before the optimizer's state.

        Args:
            state: what `state_dict` returned, for the same options, optimizer and adapters; `total_steps` may differ.

        Raises:
            StateError: It belongs to something else or is damaged; nothing is changed then.
            BindingError: The freezer is detached, or PEFT has deleted an adapter or unloaded the model.
        """
        self._check_attached()
        saved = check_state(state, self._owner())
        self._holding.restore(self.ledger.frozen)
        self._step, self._decisions.ledger = saved.step, saved.ledger
        self._holding.freeze_again(saved.ledger.frozen)
        self.planner.load(saved.planned)
        self._holding.recompute(saved.planned.recompute)
        self._scorer.disarm()
        self._arm(due=saved.evidence.due)
        self._scorer.load_evidence(saved.evidence)
        if self._engine.waits:  # compiled, the next forward would not show DDP's wrapper
            self._first_forward.begin()
        if saved.total_steps != (total := self.schedule.total_steps):
            what = "the state is of a training of %s steps, and this has %s: the last freezing is at step %d now."
            logger.warning(what, saved.total_steps, total, self.schedule.freeze_end)

    def save(self, path: str | os.PathLike[str], *, files: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Write the state into a JSON file, atomically: after a crash the old file is there, or the new one.

        Args:
            path: the file to write or replace. In a checkpoint's folder, `last_checkpoint` looks for `safe_state.json`.
            files: what else makes the checkpoint whole, written before, in the folder of `path` or below it. It is
                brought to the disk, and its checksums go into the state.

        Raises:
            StateError: `path` cannot be written, or one of `files` cannot be read; the old file is untouched.

        Example:
            >>> freezer.save("checkpoint-8/safe_state.json")  # doctest: +SKIP
        """
        found = fingerprints(jsonio.path_of(path).parent, files)
        jsonio.write_json(path, self.state_dict() | ({FILES: found} if found else {}))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote; see `load_state_dict`.

        Args:
            path: the file.

        Raises:
            StateError: It is missing or damaged, or belongs to something else; nothing is changed then.
            BindingError: The freezer is detached.

        Example:
            >>> freezer.load("checkpoint-8/safe_state.json")  # doctest: +SKIP
        """
        state = jsonio.read_json(path)
        try:
            self.load_state_dict(state)
        except StateError as error:
            raise StateError(f"{path}: {error}") from error

    def _owner(self) -> Owner:
        return Owner(self.config, self._optimizers.kinds, self._traits, self._engine.process)
