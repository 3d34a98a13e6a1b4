"""Observe, score, raise the threshold, freeze: the method, one optimizer step at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from . import jsonio
from .adapters import Adapter
from .binding import bind
from .config import SafeConfig
from .decisions import Decisions
from .errors import BindingError, SafeError
from .ledger import Ledger
from .parallel import Engine
from .paths import unwrap, unwrap_optimizer
from .planning.planner import Planner
from .report import AdapterRecord, FreezeReport
from .schedule import check_fit, is_scoring_step, resolve
from .scorer import Scorer
from .state import VERSION, check_state

logger = logging.getLogger(__name__)


class AdapterFreezer:
    """Scores a model's adapters while it trains, and freezes the least important ones for good.

    It binds the model in place; the model object stays what it is. Call `step` after every optimizer step. Adapters
    that do not train when it is made are left alone.

    Args:
        model: a PEFT model.
        optimizer: the one that trains it; accelerate's wrapper is looked through.
        config: the options.
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
        optimizer: torch.optim.Optimizer,
        config: SafeConfig | None = None,
        *,
        total_steps: int | None = None,
        first_step: int = 0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.config = config or SafeConfig()
        self.model = unwrap(model)
        self._optimizer = unwrap_optimizer(optimizer)
        self._step = first_step
        self._warned: set[str] = set()
        self._engine = Engine(self.model, model, process_group)
        with ExitStack() as undo:
            try:
                self._make(model, optimizer, total_steps, undo)
            except SafeError as error:
                self._engine.require_same(error)
                raise
            self._engine.require_same(
                {
                    "config": self.config.to_dict(),
                    "adapters": [adapter.name for adapter in self._adapters],
                    "schedule": str(self.schedule),
                    "first_step": first_step,
                }
            )
            undo.pop_all()
        if self.config.recompute == "frozen":
            self.binding.recompute.update(self.binding.blocks)
        self._attached = True
        self._arm()

    def _make(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int | None, undo: ExitStack
    ) -> None:
        """All that may fail in one process alone."""
        self._engine.check(optimizer)
        self.schedule = resolve(self.config, total_steps)
        self.binding = bind(model)
        undo.callback(self.binding.detach)
        self._adapters = self.binding.claim()
        undo.callback(self.binding.release)
        others_train, names = self._check_parameters(), [adapter.name for adapter in self._adapters]
        check_fit(self.config, names, others_train)
        self.planner = Planner(self.model, self.config, others_train, shared=not self._engine.alone)
        undo.callback(self.planner.close)
        self._decisions = Decisions(self.config, self.schedule, self.planner, len(names), others_train)
        self._scorer = Scorer(self.model, self._optimizer, self._adapters, self.config)
        undo.callback(self._scorer.close)

    def _check_parameters(self) -> bool:
        """Whether anything but the adapters trains; refuses what would train wrongly."""
        live = {id(p) for adapter in self._adapters for p in adapter.parameters()}
        if not live & {id(p) for group in self._optimizer.param_groups for p in group["params"]}:
            raise BindingError(
                "optimizer: it trains none of this model's adapters; make it from this model's parameters."
            )
        return any(p.requires_grad and id(p) not in live for p in self.model.parameters())

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
        """Account for one optimizer step that is done: finish a scoring, and freeze if the schedule says so.

        Call it after `optimizer.step()`, before or after `zero_grad()`, once per optimizer step.

        Returns:
            The names of the adapters frozen now; what they retained is gone from the next forward on.

        Raises:
            BindingError: The freezer is detached.
        """
        self._check_attached()
        self._engine.check_step()
        self._step += 1
        for adapter in self._adapters_named(self.ledger.frozen):
            self._drop(adapter)
        if self._scorer.armed:
            importance = self._measure()
            self._warn_unscored([name for name, value in importance.items() if not math.isfinite(value)])
            self._decisions.record(self._step, importance)
        self._decisions.end_warmup(self._step)
        names = self._freeze_due()
        self._arm()
        return names

    def _measure(self) -> dict[str, float]:
        """Score over all processes: what one of them alone has seen decides nothing."""
        where = f"{self._step} {self.ledger.frozen}"
        importance, other_batch = self._scorer.measure(self._engine, same=where, batch=self.planner.mark)
        seen = self.planner.seen
        self.planner.agree(self._engine.gather(seen) if other_batch else [seen])
        return importance

    def _check_attached(self) -> None:
        if not self._attached:
            raise BindingError("this freezer is detached; make a new AdapterFreezer to go on.")

    def _freeze_due(self) -> tuple[str, ...]:
        names, recompute = self._decisions.due(self._step)
        self._freeze(names)
        self._recompute(recompute)
        if names:
            logger.info("step %d: froze %d adapters, %d in all", self._step, len(names), len(self.ledger.frozen))
        return names

    def _freeze(self, names: Sequence[str]) -> None:
        if not names:
            return
        self._engine.reshard()
        for adapter in self._adapters_named(names):
            adapter.freeze(keep_dropout=self.config.keep_dropout)
            self._drop(adapter)
        self._engine.parameters_changed()

    def _restore(self) -> None:
        for adapter in self._adapters_named(self.ledger.frozen):
            adapter.restore()

    def _recompute(self, blocks: Sequence[str] | None) -> None:
        if self.config.recompute == "auto" and blocks is not None:
            self.binding.recompute.clear()
            self.binding.recompute.update(blocks)

    def _drop(self, adapter: Adapter) -> None:
        """Keep a frozen adapter still: AdamW would go on moving it by its momentum and a gradient left over."""
        adapter.hold()
        for parameter in adapter.parameters():
            self._optimizer.state.pop(parameter, None)

    def _adapters_named(self, names: Iterable[str]) -> list[Adapter]:
        wanted = set(names)
        return [adapter for adapter in self._adapters if adapter.name in wanted]

    def _arm(self) -> None:
        """Prepare the coming step."""
        frozen = set(self.ledger.frozen)
        live = [index for index, adapter in enumerate(self._adapters) if adapter.name not in frozen]
        if is_scoring_step(self.schedule, self._step + 1):
            self._scorer.arm(live, shift=len(self.ledger.scorings))

    def _warn_unscored(self, names: Sequence[str]) -> None:
        new = [name for name in names if name not in self._warned]
        if new:
            self._warned.update(new)
            some = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
            why = "%d adapters have no finite importance at step %d and stay trainable: %s; explain(model) says why."
            logger.warning(why, len(new), self._step, some)

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
        frozen = len(self.ledger.frozen)
        metrics = {"step": self._step, "frozen": frozen, "frozen_fraction": frozen / len(self._adapters)}
        if self.ledger.threshold is not None:
            metrics["threshold"] = self.ledger.threshold
        values = [value for value in self.ledger.importance.values() if math.isfinite(value)]
        if values:
            metrics |= {
                "importance_min": min(values),
                "importance_median": median(values),
                "importance_max": max(values),
            }
        return {f"safe/{name}": float(value) for name, value in metrics.items()}

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

        Example:
            >>> freezer.report().save_json("report.json")  # doctest: +SKIP
        """
        own = getattr(getattr(self.model, "config", None), "_name_or_path", "") or type(self.model).__name__
        return FreezeReport(
            model=model or own,
            config=self.config.to_dict(),
            total_steps=max(self.schedule.total_steps or 0, self._step),
            adapters=tuple(AdapterRecord(a.name, sum(p.numel() for p in a.parameters())) for a in self._adapters),
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
        if not self._attached:
            return
        self._attached = False
        self._scorer.close()
        self.planner.close()
        self.binding.release()
        if not keep_frozen:
            self._restore()
            self._engine.parameters_changed()
        self.binding.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on after a restart, as JSON values.

        Example:
            >>> json.dumps(freezer.state_dict())  # doctest: +SKIP
        """
        return {
            "version": VERSION,
            "step": self._step,
            "config": self.config.to_dict(),
            "adapters": [adapter.name for adapter in self._adapters],
            "ledger": self.ledger.to_dict(),
            "evidence": jsonio.encode(self._scorer.evidence()),
            "planned": jsonio.encode(self.planner.planned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; what was frozen is frozen again at once. Load the optimizer's state before it.

        Args:
            state: what `state_dict` returned, for the same options and the same adapters.

        Raises:
            StateError: It belongs to other options or other adapters, or is damaged; nothing is changed then.
            BindingError: The freezer is detached.
        """
        self._check_attached()
        step, ledger, evidence, planned = check_state(state, self.config, [adapter.name for adapter in self._adapters])
        self._restore()
        self._step, self._decisions.ledger = step, ledger
        self._freeze(ledger.frozen)
        self.planner.load(planned)
        self._recompute(planned.recompute)
        self._scorer.disarm()
        self._arm()
        self._scorer.load_evidence(evidence)
