"""Measures the importance of live adapters with the score from the options."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels import AdapterStatistics

from ..binding.adapters import Adapter, ScoreInputs
from ..distributed import DistributedContext
from ..errors import ConfigError, ScoreError
from ..report.records import Scoring
from .collector import StatisticsCollector
from .compile_support import EagerForwards
from .config import SafeConfig
from .nonfinite import broken_parts
from .scores import find_score
from .state import PendingScoring


class Scorer:
    """Gathers the evidence for a score in a scoring step, and computes the score.

    A score of gradients or updates is computed around the optimizer's step, and needs exactly one optimizer.

    Attributes:
        broken: by adapter name, the parts of its evidence with NaN or Inf in the latest scoring step.
        starting: names of adapters whose score is not known yet, because it compares scoring steps.
        memory: the score's own numbers by adapter name, kept between scoring steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        adapters: Sequence[Adapter],
        config: SafeConfig,
        processes: DistributedContext,
    ) -> None:
        self._adapters, self._processes, self._optimizers = adapters, processes, optimizers
        self._seed = config.seed
        self._score = find_score(config.score)
        self._live: list[int] = []
        self._step, self._scorings = 0, list[Scoring]()
        self._gathered: dict[str, float] = {}
        self._before: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        self._grad_scale = 1.0
        self.broken: dict[str, tuple[str, ...]] = {}
        self.starting: set[str] = set()
        self.memory: dict[str, dict[str, float]] = {}
        if self._score.by_optimizer and len(optimizers) > 1:
            reads = "gradients" if self._score.needs_gradients else "the optimizer's updates"
            raise ConfigError(
                f"score: {config.score!r} reads {reads} and needs exactly one optimizer, got {len(optimizers)}; "
                'choose "cka", "velocity", "relative_norm", "progress" or "random".'
            )
        self.collector = StatisticsCollector(
            model, adapters, config.score_blocks, config.block_rows, begins=processes.forward_begins
        )
        self._forwards, self._runs_eagerly = EagerForwards(), self._score.needs_statistics or config.needs_plan
        self._hooks: list[Any] = []
        if self._score.by_optimizer:
            self._hooks.append(optimizers[0].register_step_pre_hook(self._before_optimizer_step))
        if self._score.needs_update:
            self._hooks.append(optimizers[0].register_step_post_hook(self._after_optimizer_step))

    @property
    def armed(self) -> bool:
        """Whether the current or next step is a scoring step."""
        return bool(self._live)

    def arm(self, live: Sequence[int], step: int, scorings: Sequence[Scoring]) -> None:
        """Gather evidence about the adapters with these indices in the next step, after the scoring steps so far."""
        self._live, self._step, self._scorings = list(live), step, list(scorings)
        self._gathered, self._before = {}, {}
        self.broken, self.starting = {}, set()
        if self._score.needs_statistics:
            self.collector.arm(live, shift=len(scorings))  # so that each scoring step reads other rows
        if self._runs_eagerly:
            self._forwards.begin()

    def disarm(self) -> None:
        """Drop the gathered evidence."""
        self._live = []
        self._gathered, self._before = {}, {}
        self.collector.disarm()
        self._forwards.end()

    @property
    def ready(self) -> bool:
        """Whether there is evidence. A score of gradients has none if GradScaler skipped the optimizer's step."""
        return bool(self._gathered) or not self._score.by_optimizer

    def measure(self, *, same: str, batch: str) -> tuple[dict[str, float], bool]:
        """Compute importance by name from the evidence of all processes, with one all_reduce; nan means unknown.

        The text `same` must be equal in all processes. The second result is whether the text `batch` differs.
        """
        try:
            if self._score.needs_statistics:
                sums, _, differs = self._processes.sum(self.collector.finish(), same=same, batch=batch)
                return self._judge_all(sums.cpu()), differs
            own = self._gathered if self._score.by_optimizer else self._judge_all(None)
            names = [self._adapters[index].name for index in self._live]
            values = torch.tensor([own.get(name, math.nan) for name in names], dtype=torch.float64)
            values, count, differs = self._processes.sum(values.to(self.collector.device), same=same, batch=batch)
            return dict(zip(names, (values / count).tolist(), strict=True)), differs
        finally:
            self.disarm()

    def close(self) -> None:
        """Remove all hooks from the model and the optimizer."""
        self.disarm()
        self.collector.close()
        for hook in self._hooks:
            hook.remove()

    def evidence(self) -> PendingScoring:
        """Return the evidence gathered so far in this step."""
        return PendingScoring(
            self.collector.sums(), dict(self._gathered), dict(self.broken) if self.armed else {}, self.armed
        )

    def load_evidence(self, evidence: PendingScoring) -> None:
        """Continue from the output of `evidence`, if armed for the same step."""
        if self.armed:
            self.collector.load_sums(evidence.sums)
            self._gathered, self.broken = dict(evidence.importance), dict(evidence.broken)

    def _before_optimizer_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Score before the optimizer's step, when gradients exist; with a closure, after its call."""
        if not self.armed:
            return None
        self._before = {}  # an earlier call of this step may have failed
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._gather(optimizer)
            return None

        def observed() -> Any:
            loss = closure()
            if not self._gathered and not self._before:
                self._gather(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": observed}

    def _gather(self, optimizer: Any) -> None:
        """Score by gradients. A fused optimizer itself divides them by GradScaler's scale, and skips steps."""
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None and float(found_inf):
            return
        self._grad_scale = 1.0 if scale is None else float(scale)
        if self._score.needs_update:
            parameters = [p for index in self._live for p in self._adapters[index].parameters()]
            self._before = {p: (_copy(p), None if p.grad is None else _copy(p.grad)) for p in parameters}
        else:
            self._gathered = self._judge_all(None)

    def _after_optimizer_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Score by the optimizer's update, and drop the copies."""
        if self._before:
            self._gathered = self._judge_all(None)
            self._before = {}

    @torch.no_grad()
    def _judge_all(self, sums: Tensor | None) -> dict[str, float]:
        rows = [None] * len(self._live) if sums is None else sums[self._live].unbind()
        named = zip(self._live, rows, strict=True)
        return {self._adapters[index].name: self._judge(index, row) for index, row in named}

    def _judge(self, index: int, sums: Tensor | None) -> float:
        name = self._adapters[index].name
        evidence, is_first = self._evidence(index, sums), name not in self.memory
        made = self._score.function(evidence)
        try:
            value = float(made)
            memory = {key: float(number) for key, number in evidence.memory.items()}
        except (TypeError, ValueError, OverflowError):
            also = f", and so must the values of its memory {list(evidence.memory)}" if evidence.memory else ""
            what = f"the score of {name!r} must be a number, got {made!r}{also}; fix the score function."
            raise ScoreError(what) from None
        if memory:
            self.memory[name] = memory
        if math.isfinite(value):
            return value
        if is_first and memory:  # there is no earlier value to compare with; this is not an error
            self.starting.add(name)
        elif parts := broken_parts(evidence):
            self.broken[name] = parts
        return math.nan

    def _evidence(self, index: int, sums: Tensor | None) -> ScoreInputs:
        adapter, scorings = self._adapters[index], self._scorings
        evidence, name = adapter.evidence(None if sums is None else AdapterStatistics(sums)), adapter.name
        evidence.generator, evidence.grad_scale = random.Random(f"{self._seed}/{index}"), self._grad_scale
        evidence.optimizer.optimizers, evidence.optimizer.before = self._optimizers, self._before
        evidence.step, evidence.memory = self._step, dict(self.memory.get(name, {}))
        evidence.past = lambda: [(one.step, one.importance[name]) for one in scorings if name in one.importance]
        return evidence


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
