"""The training loop: one run, with or without freezing, measured as it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from ..errors import PlanError, SafeError
from ..freezing.config import SafeConfig
from ..loss import BY_NAME, Loss
from ..loss.check import IGNORED, check
from ..report.records import AdapterRecord, RunRecord
from ..report.report import FreezeReport
from . import measure
from .batches import Batch, Examples
from .config import FinetuneConfig
from .progress import Tick, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Prepared:
    model: Any  # a PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Examples
    eval: Examples
    device: torch.device

    def place(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) for name, value in batch.items()}


class Training:
    """The state of one training: model, optimizer, schedule, freezer, and what was measured so far."""

    def __init__(self, config: FinetuneConfig, prepared: Prepared, console: Console) -> None:
        self.config, self.prepared, self.console = config, prepared, console
        self.model, self.loss = prepared.model, BY_NAME[config.loss]
        self.steps = config.max_steps or config.epochs * math.ceil(len(prepared.train) / config.batch_size)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.adapters = _adapters(self.model)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = _linear_schedule(self.optimizer, round(config.warmup_ratio * self.steps), self.steps)
        self.freezer, self.binding = self._bind()
        self.probe = prepared.place(next(prepared.train.shuffled(config.batch_size, config.seed)))
        if config.loss == "chunked":
            check(self.model, self.probe)
        self.retained: list[tuple[int, int]] = []
        self.seconds = 0.0

    def _bind(self) -> tuple[Any, Any]:
        from ..binding import bind as binding
        from ..freezing import freezer

        if self.config.method == "safe":
            config = SafeConfig.from_dict(self.config.safe)
            bound = freezer.AdapterFreezer(self.model, self.optimizer, config, total_steps=self.steps)
            return bound, bound
        return None, binding.bind(self.model) if self.config.method == "bind" else None

    def run(self) -> FreezeReport:
        """Train, evaluate, and detach whatever was bound."""
        flops_start = self._measure(measure.step_flops)
        self._note_retained(0)
        self._train()
        peak_rss = measure.peak_rss()
        self._note_retained(self.steps)
        flops_end = self._measure(measure.step_flops)
        metric, value = self._evaluate()
        record = RunRecord(
            method=self.config.label,
            seed=self.config.seed,
            metric=metric,
            value=value,
            eval_rows=len(self.prepared.eval),
            steps=self.steps,
            adapters=len(self.adapters),
            frozen=self._frozen(),
            seconds=self.seconds,
            peak_rss=peak_rss,
            retained=tuple(self.retained),
            flops_start=flops_start,
            flops_end=flops_end,
        )
        report = self._report(record)
        if self.binding is not None:
            self.binding.detach()
        return report

    def _train(self) -> None:
        self.model.train()
        torch.manual_seed(self.config.seed + 1)  # the same dropout whatever was drawn while the model was made
        batches = self.prepared.train.shuffled(self.config.batch_size, self.config.seed)
        with progress(f"train ({self.config.label})", self.steps, self.console) as tick:
            for step, batch in zip(range(1, self.steps + 1), batches, strict=False):
                self._step(step, batch, tick)

    def _step(self, step: int, batch: Batch, tick: Tick) -> None:
        frozen = self._frozen()
        # The processor's time, since a busy machine stretches any other; a GPU's work is not in it.
        clock = time.process_time if self.prepared.device.type == "cpu" else time.perf_counter
        start = clock()
        loss = self.loss(self.model, self.prepared.place(batch))
        if loss.requires_grad:  # it does not once everything that trained is frozen
            loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.freezer is not None:
            self.freezer.step()
        value = loss.item()
        self.seconds += clock() - start
        if not math.isfinite(value):
            raise SafeError(f"the loss is {value} at step {step}; lower --learning-rate, or look for broken rows.")
        if self._frozen() > frozen:
            self._note_retained(step)
        state = f"  frozen {self._frozen()}/{len(self.adapters)}" if self.freezer is not None else ""
        tick(f"loss {value:.3f}{state}")

    def _measure(self, measure: Any) -> int:
        with self._suspended():
            return measure(self.model, self.probe, self.loss)

    def _note_retained(self, step: int) -> None:
        self.retained.append((step, self._measure(measure.retained_bytes)))

    def _suspended(self) -> AbstractContextManager[Any]:
        return self.freezer.suspended() if self.freezer is not None else nullcontext()

    def _frozen(self) -> int:
        return len(self.freezer.ledger.freezings) if self.freezer is not None else 0

    def _report(self, record: RunRecord) -> FreezeReport:
        title = self.config.title or f"{self.config.model} on {Path(self.config.train).name}"
        if self.freezer is None:
            report = FreezeReport(title, {"method": self.config.method}, self.steps, self.adapters)
        else:
            report = replace(self._planned_report(), model=title)
        return replace(report, retained=record.retained, runs=(record,))

    def _planned_report(self) -> FreezeReport:
        try:
            report: FreezeReport = self.freezer.report(memory=True)
        except PlanError as error:
            self.console.print(f"no memory plan: {error}", highlight=False)
            report = self.freezer.report()
        return report

    def _evaluate(self) -> tuple[str, float]:
        examples, size = self.prepared.eval, 2 * self.config.batch_size
        total = math.ceil(len(examples) / size)
        score = _accuracy if self.config.task == "seq-cls" else partial(_loss_sum, self.loss)
        gained, units = 0.0, 0
        shown = progress(f"evaluate ({self.config.label})", total, self.console, lines=1)
        with self._suspended(), _evaluating(self.model), shown as tick:
            for batch in examples.in_order(size):
                gain, count = score(self.model, self.prepared.place(batch))
                gained, units = gained + gain, units + count
                tick()
        mean = gained / units
        return ("accuracy", mean) if self.config.task == "seq-cls" else ("perplexity", math.exp(min(mean, 700.0)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def _accuracy(model: nn.Module, batch: Batch) -> tuple[float, int]:
    labels = batch.pop("labels")
    return float((model(**batch).logits.argmax(-1) == labels).sum()), len(labels)


def _loss_sum(loss: Loss, model: nn.Module, batch: Batch) -> tuple[float, int]:
    """Return the summed loss and the number of predicted tokens: all but each row's first."""
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    return float(loss(model, batch)) * count, count


def _linear_schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    def factor(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else (steps - step) / max(1, steps - warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _adapters(model: nn.Module) -> tuple[AdapterRecord, ...]:
    """List the layers that hold a LoRA pair, by PEFT's own attribute names."""
    found = []
    for name, module in model.named_modules():
        parts = [getattr(module, part, None) for part in ("lora_A", "lora_B")]
        pair = [part for part in parts if isinstance(part, nn.ModuleDict) and len(part)]
        if len(pair) == len(parts):
            found.append(AdapterRecord(name, sum(p.numel() for part in pair for p in part.parameters())))
    return tuple(found)
