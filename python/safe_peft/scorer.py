"""Measures the importance of live adapters by whichever score the options name."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels import AdapterStatistics

from .adapters import Adapter
from .config import SafeConfig
from .importance import Evidence, find_score
from .observation import Observation
from .parallel import Engine
from .state import Gathered


class Scorer:
    """Gathers the evidence a score needs, in the step it is needed for, and judges it.

    Args:
        model: the model whose forwards are observed.
        optimizer: the one that trains it; a score that reads gradients reads them before its step.
        adapters: whom this may be about.
        config: the options.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, adapters: Sequence[Adapter], config: SafeConfig
    ) -> None:
        self._adapters = adapters
        self._seed = config.seed
        self._score = find_score(config.score)
        self._live: list[int] = []
        self._gathered: dict[str, float] = {}
        self.observation = Observation(model, adapters, config.score_blocks, config.block_rows)
        hooked = self._score.needs_gradients
        self._hook = optimizer.register_step_pre_hook(self._before_optimizer_step) if hooked else None

    @property
    def armed(self) -> bool:
        """Whether a scoring is due in the step that comes or runs."""
        return bool(self._live)

    def arm(self, live: Sequence[int], shift: int) -> None:
        """Gather evidence in the coming step.

        Args:
            live: indices of the adapters to score.
            shift: moves the row blocks, so that successive scorings see other rows.
        """
        self._live = list(live)
        self._gathered = {}
        if self._score.needs_statistics:
            self.observation.arm(live, shift)

    def disarm(self) -> None:
        """Forget what was gathered."""
        self._live = []
        self._gathered = {}
        self.observation.disarm()

    def measure(self, engine: Engine, *, same: str, batch: str) -> tuple[dict[str, float], bool]:
        """Judge what was gathered in all processes, with one all_reduce.

        Args:
            engine: the processes that train together.
            same: what has to be the same in all of them now.
            batch: what may differ.

        Returns:
            Importance by adapter name, the same in every process; nan where it cannot be told. And whether `batch`
            differs.

        Raises:
            BindingError: `same` differs.
        """
        if self._score.needs_statistics:
            sums, _, differs = engine.sum(self.observation.finish(), same=same, batch=batch)
            importance = self._judge_all(sums.cpu())
        else:
            own = self._gathered if self._score.needs_gradients else self._judge_all(None)
            names = [self._adapters[index].name for index in self._live]
            values = torch.tensor([own.get(name, math.nan) for name in names], dtype=torch.float64)
            values, count, differs = engine.sum(values.to(self.observation.device), same=same, batch=batch)
            importance = dict(zip(names, (values / count).tolist(), strict=True))
        self.disarm()
        return importance, differs

    def close(self) -> None:
        """Take every hook off the model and the optimizer."""
        self.disarm()
        self.observation.close()
        if self._hook is not None:
            self._hook.remove()

    def evidence(self) -> Gathered:
        """Return what was gathered so far in this step."""
        return Gathered(self.observation.sums(), dict(self._gathered))

    def load_evidence(self, evidence: Gathered) -> None:
        """Go on from what `evidence` returned, if armed for the same step."""
        if self.armed:
            self.observation.load_sums(evidence.sums)
            self._gathered = dict(evidence.importance)

    def _before_optimizer_step(self, *_: Any) -> None:
        if self.armed:  # gradients are there only now
            self._gathered = self._judge_all(None)

    @torch.no_grad()
    def _judge_all(self, sums: Tensor | None) -> dict[str, float]:
        return {self._adapters[i].name: self._judge(i, None if sums is None else sums[i]) for i in self._live}

    def _judge(self, index: int, sums: Tensor | None) -> float:
        evidence = self._adapters[index].evidence(None if sums is None else AdapterStatistics(sums))
        generator = random.Random(f"{self._seed}/{index}")
        value = self._score.function(Evidence(**vars(evidence) | {"generator": generator}))
        return value if math.isfinite(value) else math.nan
