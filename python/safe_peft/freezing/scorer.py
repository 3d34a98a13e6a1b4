"""Measures the importance of live adapters with the score from the options."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels import AdapterStatistics

from ..binding.adapters import Adapter
from ..distributed import DistributedContext
from ..errors import ConfigError, ScoreError
from .collector import StatisticsCollector
from .compile_support import EagerForwards
from .config import SafeConfig
from .nonfinite import broken_parts
from .scores import find_score
from .state import PendingScoring


class Scorer:
    """Gathers the evidence for a score in a scoring step, and computes the score.

    Args:
        model: the model whose forwards are observed.
        optimizers: the optimizers of the model. A score of gradients reads them before the optimizer's step.
        adapters: all adapters that may be scored.
        config: the options.
        processes: the processes that train together.

    Attributes:
        broken: by adapter name, the parts of its evidence with NaN or Inf in the latest scoring step.

    Raises:
        ConfigError: The score reads gradients, and there are several optimizers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        adapters: Sequence[Adapter],
        config: SafeConfig,
        processes: DistributedContext,
    ) -> None:
        self._adapters, self._processes = adapters, processes
        self._seed = config.seed
        self._score = find_score(config.score)
        self._live: list[int] = []
        self._gathered: dict[str, float] = {}
        self.broken: dict[str, tuple[str, ...]] = {}
        if self._score.needs_gradients and len(optimizers) > 1:
            raise ConfigError(
                f"score: {config.score!r} reads gradients and needs exactly one optimizer, got {len(optimizers)}; "
                'choose "cka", "relative_norm" or "random".'
            )
        self.collector = StatisticsCollector(
            model, adapters, config.score_blocks, config.block_rows, begins=processes.forward_begins
        )
        self._forwards = EagerForwards() if self._score.needs_statistics or config.needs_plan else None
        hooked = self._score.needs_gradients
        self._hook = optimizers[0].register_step_pre_hook(self._before_optimizer_step) if hooked else None

    @property
    def armed(self) -> bool:
        """Whether the current or next step is a scoring step."""
        return bool(self._live)

    def arm(self, live: Sequence[int], shift: int) -> None:
        """Gather evidence in the next step.

        Args:
            live: indices of the adapters to score.
            shift: moves the row blocks, so that successive scoring steps read other rows.
        """
        self._live = list(live)
        self._gathered = {}
        self.broken = {}
        if self._score.needs_statistics:
            self.collector.arm(live, shift)
        if self._forwards is not None:
            self._forwards.begin()

    def disarm(self) -> None:
        """Drop the gathered evidence."""
        self._live = []
        self._gathered = {}
        self.collector.disarm()
        if self._forwards is not None:
            self._forwards.end()

    @property
    def ready(self) -> bool:
        """Whether there is evidence. A score of gradients has none if GradScaler skipped the optimizer's step."""
        return bool(self._gathered) or not self._score.needs_gradients

    def measure(self, *, same: str, batch: str) -> tuple[dict[str, float], bool]:
        """Compute the score from the evidence of all processes, with one all_reduce.

        Args:
            same: a text that must be equal in all processes.
            batch: a text that may differ between processes.

        Returns:
            Importance by adapter name, the same in every process, nan where it is unknown; and whether `batch` differs.

        Raises:
            BindingError: `same` differs.
            ScoreError: The score is not a number.
        """
        try:
            return self._measure(same, batch)
        finally:
            self.disarm()

    def _measure(self, same: str, batch: str) -> tuple[dict[str, float], bool]:
        if self._score.needs_statistics:
            sums, _, differs = self._processes.sum(self.collector.finish(), same=same, batch=batch)
            return self._judge_all(sums.cpu()), differs
        own = self._gathered if self._score.needs_gradients else self._judge_all(None)
        names = [self._adapters[index].name for index in self._live]
        values = torch.tensor([own.get(name, math.nan) for name in names], dtype=torch.float64)
        values, count, differs = self._processes.sum(values.to(self.collector.device), same=same, batch=batch)
        return dict(zip(names, (values / count).tolist(), strict=True)), differs

    def close(self) -> None:
        """Remove all hooks from the model and the optimizer."""
        self.disarm()
        self.collector.close()
        if self._hook is not None:
            self._hook.remove()

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
        """Gradients exist only now. If a closure computes them, they exist after its call."""
        if not self.armed:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._gather(optimizer)
            return None

        def observed() -> Any:
            loss = closure()
            if not self._gathered:
                self._gather(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": observed}

    def _gather(self, optimizer: Any) -> None:
        """Score by gradients. A fused optimizer itself divides them by GradScaler's scale, and skips steps."""
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is None or not float(found_inf):
            self._gathered = self._judge_all(None, 1.0 if scale is None else float(scale))

    @torch.no_grad()
    def _judge_all(self, sums: Tensor | None, grad_scale: float = 1.0) -> dict[str, float]:
        rows = [None] * len(self._live) if sums is None else sums[self._live].unbind()
        named = zip(self._live, rows, strict=True)
        return {self._adapters[index].name: self._judge(index, row, grad_scale) for index, row in named}

    def _judge(self, index: int, sums: Tensor | None, grad_scale: float) -> float:
        evidence = self._adapters[index].evidence(None if sums is None else AdapterStatistics(sums))
        evidence.generator, evidence.grad_scale = random.Random(f"{self._seed}/{index}"), grad_scale
        made = self._score.function(evidence)
        try:
            value = float(made)
        except (TypeError, ValueError, OverflowError):
            name = self._adapters[index].name
            raise ScoreError(f"the score of {name!r} must be a number, got {made!r}; fix the score function.") from None
        if math.isfinite(value):
            return value
        if parts := broken_parts(evidence):
            self.broken[self._adapters[index].name] = parts
        return math.nan
