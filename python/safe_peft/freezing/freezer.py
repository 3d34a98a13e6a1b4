"""The method, one optimizer step at a time: observe, score, raise the threshold, freeze."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from safe_kernels.reference import MASK_VERSION

from ..binding.adapters import Adapter
from ..binding.bind import bind
from ..distributed import DistributedContext
from ..distributed.wrappers import trains_besides, unwrap
from ..errors import BindingError, SafeError, StateError
from ..files import jsonio
from ..files.checkpoints import fingerprints
from ..prefix.cache import PrefixCache
from ..prefix.store import Store
from ..report.records import AdapterRecord, mebibytes
from ..report.report import FreezeReport
from .byte_planner import Planner
from .compile_support import EagerForwards
from .config import SafeConfig, check_int
from .decisions import Decisions
from .enforcement import FreezeEnforcer
from .forgotten import Standing
from .ledger import Ledger
from .nonfinite import NonFinite
from .optimizer_state import Optimizers
from .schedule import check_fit, is_scoring_step, resolve
from .scorer import Scorer
from .state import FILES, FreezerState, RunIdentity, check_state, state_of

logger = logging.getLogger(__name__)


class AdapterFreezer:
    """Scores a model's adapters during training, and freezes the least important ones permanently.

    It binds the model in place. Call `step` after every optimizer step. Adapters that do not train when the freezer is
    created are not changed.

    Args:
        model: a PEFT model, or a module that contains one or several.
        optimizer: the optimizer of the model, possibly in a wrapper such as accelerate's. If parameters have their own
            optimizers, a list of all of them.
        config: the options, or a dict of them.
        total_steps: optimizer steps of the whole training; needed if an option is a share of it.
        first_step: optimizer steps that were done before.
        process_group: the processes that share the batch and decide together. None means DDP's group, FSDP2's mesh, or
            all processes. Each process makes its freezer after the model is wrapped.

    Raises:
        BindingError: The model has no trainable adapter, already has a freezer, is not trained by the optimizer, or
            uses an unsupported training engine; or another process differs.
        ConfigError: An option does not fit this model.

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
        self._nonfinite = NonFinite(raises=self.config.on_nonfinite == "raise")
        self._processes, self._first_forward = DistributedContext(self.model, model, process_group), EagerForwards()
        with ExitStack() as undo:
            try:
                hooks = self._make(model, total_steps, undo)
            except SafeError as error:
                self._processes.require_same(error)
                raise
            same = {"config": self.config.to_dict(), "adapters": list(self._traits), "schedule": str(self.schedule)}
            self._processes.require_same({**same, "first_step": first_step})
            if self.prefix is not None and not self._processes.alone:
                self.prefix.store.share(self._processes.gather)
            self._arm()
            parts = (self._enforcer, self._decisions, self._processes.alone)
            self.standing = Standing(hooks, undo.pop_all(), *parts)
        if self.config.recompute == "frozen":
            self.binding.recompute.update(self.binding.blocks)
        self.standing.follow(self, self.binding)

    def _make(self, model: nn.Module, total_steps: int | None, undo: ExitStack) -> ExitStack:
        """Run all steps that may fail in a single process; return the objects that remove the hooks."""
        for one in self._optimizers.given:
            self._processes.check(one)
        self.schedule = resolve(self.config, total_steps)
        self.binding = bind(model)
        undo.callback(self.binding.detach)
        self._adapters = self.binding.claim()
        undo.callback(self.binding.release)
        hooks = undo.enter_context(ExitStack())
        hooks.callback(self._first_forward.end)
        self._records = tuple(AdapterRecord(a.name, sum(p.numel() for p in a.parameters())) for a in self._adapters)
        self._traits = {adapter.name: adapter.traits() for adapter in self._adapters}
        self._optimizers.check(self._adapters)
        own = [p for adapter in self._adapters for p in adapter.parameters()]
        others_train, names = trains_besides(self.model, own), list(self._traits)
        check_fit(self.config, names, others_train)
        parts = (self.model, self.config, others_train, self._adapters)
        self.planner = hooks.enter_context(closing(Planner(*parts, shared=not self._processes.alone)))
        self._decisions = Decisions(self.schedule, self.planner, len(names))
        self.prefix = prefix_cache(self.model, self.config)
        if self.prefix is not None:
            hooks.callback(self.prefix.close)
        scorer = Scorer(self.model, self._optimizers.inner, self._adapters, self.config, self._processes)
        self._scorer = hooks.enter_context(closing(scorer))
        engine = (self._optimizers, self._processes)
        self._enforcer = FreezeEnforcer(self.model, self._adapters, self.binding, *engine, self.config)
        return hooks

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters of this freezer, in the model's order."""
        return tuple(self._adapters)

    @property
    def ledger(self) -> Ledger:
        """The record of scoring steps and freeze events."""
        return self._decisions.ledger

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the frozen adapters, in the order in which they were frozen."""
        return self.ledger.frozen

    @property
    def unscored(self) -> tuple[str, ...]:
        """Adapters without finite importance in the latest scoring step; these are never frozen."""
        return tuple(name for name, value in self.ledger.importance.items() if not math.isfinite(value))

    def step(self) -> tuple[str, ...]:
        """Finish one optimizer step: score in a scoring step, and freeze adapters if the schedule says so.

        Call it after `optimizer.step()`, before or after `zero_grad()`, once per optimizer step.

        Returns:
            The names of the adapters frozen now. From the next forward on, their activations are not retained.

        Raises:
            BindingError: The freezer is detached, or PEFT has deleted an adapter or unloaded the model.
            ScoreError: A score is NaN or Inf, and `on_nonfinite` is "raise". The step still counts, and the freezer
                stays usable.
        """
        self._check_attached()
        self._processes.check_step()
        self._first_forward.end()
        self._step += 1
        self.standing.finished = self._step >= (self.schedule.total_steps or math.inf)
        error = None
        self.planner.end_step()
        self._enforcer.reassert(self.ledger.frozen)
        if self._scorer.armed and not self._scorer.ready:
            self._nonfinite.note_postponed(self._step)
        elif self._scorer.armed:
            importance = self._measure()
            known = {name: value for name, value in importance.items() if name not in self._scorer.starting}
            error = self._nonfinite.note(self._step, known, self._scorer.broken)
            self._decisions.record(self._step, importance)
        self._decisions.end_warmup(self._step)
        names = self._freeze_due()
        self._arm()
        if error is not None:
            raise error
        return names

    def _measure(self) -> dict[str, float]:
        """Score over all processes, so that all of them make the same decisions."""
        where = f"{self._step} {self.ledger.frozen}"
        importance, other_batch = self._scorer.measure(same=where, batch=self.planner.mark)
        known = self.planner.knowledge
        self.planner.agree(self._processes.gather(known) if other_batch else [known])
        return importance

    def _check_attached(self) -> None:
        if not self.standing.attached:
            raise BindingError("this freezer is detached; make a new AdapterFreezer to continue.")
        self._enforcer.check_present()

    def _freeze_due(self) -> tuple[str, ...]:
        before, (names, recompute) = self.ledger.frozen, self._decisions.due(self._step)
        rerun = tuple(self.binding.recompute)
        self._enforcer.freeze(names)
        self._enforcer.recompute(recompute)
        if names:
            text = f"froze {len(names)} adapters, {len(self.frozen)} of {len(self._adapters)} in all"
            was, now = self.planner.retained(before, rerun), self._retained()
            if was is not None and now is not None:
                text += f"; a step retains {mebibytes(now):,.1f} MiB for backward, {mebibytes(was - now):,.1f} MiB less"
            logger.info("step %d: %s", self._step, text)
        return names

    def _retained(self) -> int | None:
        return self.planner.retained(self.ledger.frozen, tuple(self.binding.recompute))

    def _arm(self, due: bool = False) -> None:
        """Prepare the next step. If `due`, it measures importance, because the last measurement had no evidence."""
        frozen = set(self.ledger.frozen)
        live = [index for index, adapter in enumerate(self._adapters) if adapter.name not in frozen]
        if due or self._scorer.armed or is_scoring_step(self.schedule, self._step + 1):
            self._scorer.arm(live, self._step + 1, self.ledger.scorings)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Score nothing inside the block: for forwards in training mode that are not part of the training.

        Example:
            >>> with freezer.suspended():  # doctest: +SKIP
            ...     reference = model(**other_batch)
        """
        uncached = self.prefix.suspended() if self.prefix is not None else nullcontext()
        with self._scorer.collector.suspended(), self.planner.suspended(), uncached:
            yield

    def metrics(self) -> dict[str, float]:
        """Return the current state as finite numbers named `safe/*`, for a logger.

        Example:
            >>> freezer.metrics()["safe/frozen"]  # doctest: +SKIP
            27.0
        """
        metrics, retained = self.ledger.metrics(self._step, len(self._adapters)), self._retained()
        if self.prefix is not None:
            metrics |= self.prefix.metrics()
        return metrics if retained is None else metrics | {"safe/retained_bytes": float(retained)}

    def report(
        self, model: str | None = None, retained: Sequence[tuple[int, int]] = (), *, memory: bool = False
    ) -> FreezeReport:
        """Return a report of the training so far.

        Args:
            model: the model's name in the report; None takes the name from the model's config.
            retained: pairs of (optimizer step, bytes retained by a forward from that step on), if they were measured.
            memory: add memory plans of a step at the start and now; this takes seconds for a large model.

        Raises:
            PlanError: `memory` is True, and no batch is known or the model does not run without values.
            BindingError: `memory` is True, and PEFT has deleted an adapter or unloaded the model.

        Example:
            >>> freezer.report().save_json("report.json")  # doctest: +SKIP
        """
        if memory:
            self._enforcer.check_present()
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
        """Remove all hooks from the model and the optimizer. A second call does nothing; `report` still works.

        Args:
            keep_frozen: leave adapters frozen, with dropout off; otherwise all train again as before. The optimizer's
                state of frozen adapters is gone in both cases.
        """
        if not self.standing.attached:
            return
        self.standing.attached = False
        self.standing.hooks.close()
        if not keep_frozen:
            self._enforcer.restore(self.ledger.frozen)
            self._processes.parameters_changed()
        self.standing.undo.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed after a restart, as JSON values.

        Example:
            >>> json.dumps(freezer.state_dict())  # doctest: +SKIP
        """
        evidence = replace(self._scorer.evidence(), process=self._processes.process)
        planned, total, memory = self.planner.state(), self.schedule.total_steps, self._scorer.memory
        return state_of(self._identity(), FreezerState(self._step, total, self.ledger, evidence, planned, memory))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state and freeze its adapters again. Load the weights before it, the optimizer's state after it.

        Args:
            state: the output of `state_dict` with the same options, optimizer and adapters; `total_steps` may differ.

        Raises:
            StateError: It belongs to another training or is damaged; nothing is changed then.
            BindingError: The freezer is detached, or PEFT has deleted an adapter or unloaded the model.
        """
        self._check_attached()
        saved = check_state(state, self._identity(), self._processes.process)
        self._enforcer.restore(self.ledger.frozen)
        self._step, self._decisions.ledger = saved.step, saved.ledger
        self._enforcer.freeze_again(saved.ledger.frozen)
        self.planner.load(saved.planned)
        self._enforcer.recompute(saved.planned.recompute)
        self._scorer.disarm()
        self._scorer.memory = saved.memory
        self._arm(due=saved.evidence.due)
        self._scorer.load_evidence(saved.evidence)
        if self._processes.waits:  # a compiled forward would not call DDP's wrapper hooks
            self._first_forward.begin()
        if saved.total_steps != (total := self.schedule.total_steps):
            what = "the state was saved with %s total steps, now there are %s: the last freeze event is at step %d."
            logger.warning(what, saved.total_steps, total, self.schedule.freeze_end)
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        if drops and saved.mask_version != MASK_VERSION:
            what = "the state was saved with version %d of dropout's masks, now it is %d: from here on dropout differs."
            logger.warning(what, saved.mask_version, MASK_VERSION)

    def save(self, path: str | os.PathLike[str], *, files: Iterable[str | os.PathLike[str]] = ()) -> None:
        """Write the state into a JSON file atomically: after a crash either the old file or the new one exists.

        Args:
            path: the file to write or replace. In a checkpoint's folder, `last_checkpoint` looks for `safe_state.json`.
            files: the checkpoint's other files, already written in the folder of `path` or below it. They are synced
                to disk, and their checksums go into the state.

        Raises:
            StateError: `path` cannot be written, or one of `files` cannot be read; the old file is untouched.

        Example:
            >>> freezer.save("checkpoint-8/safe_state.json")  # doctest: +SKIP
        """
        found = fingerprints(jsonio.path_of(path).parent, files)
        jsonio.write_json(path, self.state_dict() | ({FILES: found} if found else {}))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a file from `save`; see `load_state_dict`.

        Args:
            path: the file.

        Raises:
            StateError: It is missing or damaged, or belongs to another training; nothing is changed then.
            BindingError: The freezer is detached.

        Example:
            >>> freezer.load("checkpoint-8/safe_state.json")  # doctest: +SKIP
        """
        state = jsonio.read_json(path)
        try:
            self.load_state_dict(state)
        except StateError as error:
            raise StateError(f"{path}: {error}") from error

    def _identity(self) -> RunIdentity:
        return RunIdentity(self.config.to_dict(), self._optimizers.kinds, self._traits)


def prefix_cache(model: nn.Module, config: SafeConfig) -> PrefixCache | None:
    """Return the prefix cache of a bound model; None if the options have none."""
    memory, file = (size if isinstance(size, int) else 0 for size in (config.prefix_cache, config.prefix_file))
    return PrefixCache(model, Store(memory, file), dropout=config.prefix_dropout) if memory or file else None
