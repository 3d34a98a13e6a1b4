"""One training with transformers' Trainer, and its cost."""

from __future__ import annotations

import math
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from safe_kernels import RowBlocks
from safe_kernels.flops import statistics_flop

from ..binding.adapters.lora import LoraAdapter
from ..binding.bind import bind
from ..callback import SafeCallback
from ..errors import PlanError, SafeError
from ..freezing.config import SafeConfig
from ..loss import BY_NAME, IGNORED, Loss
from ..loss.check import check
from ..planning.tracing import live_adapters
from ..report.records import AdapterRecord, RunRecord, total
from ..report.report import FreezeReport
from . import measure
from .config import FinetuneConfig
from .data import Row
from .models import device_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINES = 20  # lines of progress


@dataclass
class Prepared:
    model: Any  # a PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: list[Row]
    eval: list[Row]


def train(config: FinetuneConfig, prepared: Prepared, console: Console) -> FreezeReport:
    """Train, evaluate, and detach the model; return the report with one measured run."""
    safe = SafeCallback(SafeConfig.from_dict(config.safe), detach=False) if config.method == "safe" else None
    with tempfile.TemporaryDirectory() as folder, bind(prepared.model) if config.method == "bind" else nullcontext():
        trainer = _trainer(config, prepared, folder, safe)
        probe = next(iter(trainer.get_train_dataloader()))
        if config.loss == "chunked":
            check(prepared.model, probe)
        costs = _Costs(probe, trainer.loss, safe)
        trainer.add_callback(costs)
        trainer.add_callback(_Lines(config.label, console, safe))
        trainer.train()
        value = _evaluate(trainer, config.task, safe)
        scoring = _scoring_flops(safe, probe["input_ids"].numel())
        skipped = _skipped_flops(safe, prepared.model, probe, trainer.loss)
        report = _report(config, prepared.model, trainer.state.max_steps, safe, console)
        if safe is not None:
            safe.freezer.detach()
    run = RunRecord(
        method=config.label,
        seed=config.seed,
        metric="accuracy" if config.task == "seq-cls" else "perplexity",
        value=value,
        eval_rows=len(prepared.eval),
        steps=trainer.state.global_step,
        adapters=len(report.adapters),
        frozen=len(report.freezings),
        seconds=costs.seconds,
        peak_rss=costs.peak_rss,
        retained=tuple(costs.retained),
        flops_start=costs.flops[0][1],
        flops_end=costs.flops[-1][1],
        flops_run=total(costs.flops, trainer.state.global_step) + scoring - skipped,
        prefix_bytes=costs.prefix_bytes,
    )
    return replace(report, retained=run.retained, runs=(run,))


def _trainer(config: FinetuneConfig, prepared: Prepared, folder: str, safe: SafeCallback | None) -> _Trainer:
    steps = config.max_steps or config.epochs * math.ceil(len(prepared.train) / config.batch_size)
    is_cpu = device_name(config.device) == "cpu"
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=round(config.warmup_ratio * steps),
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=is_cpu,
        dataloader_pin_memory=not is_cpu,
        label_names=["labels"],
        logging_steps=math.ceil(steps / LINES),
        save_strategy="no",
        report_to=[],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, DataParallel would run, which cannot train a bound model
    trainer = _Trainer(
        BY_NAME[config.loss],
        model=prepared.model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=_collator(config.task, prepared.tokenizer),
        callbacks=[] if safe is None else [safe],
    )
    for shown in (PrinterCallback, ProgressCallback):  # both write to standard output, which is for the result only
        trainer.remove_callback(shown)
    return trainer


def _collator(task: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    padder = copy(tokenizer)
    padder.padding_side = "right"  # otherwise a token predicted from padding would be a target
    # DataCollatorForLanguageModeling ignores every target that equals the padding token, which may be a real token.
    return DataCollatorWithPadding(padder) if task == "seq-cls" else DataCollatorForSeq2Seq(padder)


class _Trainer(Trainer):
    """A Trainer with one of our losses, which stops if the loss is not finite."""

    def __init__(self, loss: Loss, **options: Any) -> None:
        super().__init__(**options)
        self.loss = loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        loss: Tensor = self.loss(model, inputs)
        if not math.isfinite(value := loss.item()):
            step = self.state.global_step + 1
            raise SafeError(f"the loss is {value} at step {step}; lower --learning-rate, or check the rows for errors.")
        return loss


class _Costs(TrainerCallback):
    """Measures a step on a fixed batch (`probe`) at the start, after each freeze event and at the end, and the time.

    The callback that freezes, if any, must run before this one.
    """

    def __init__(self, probe: measure.Batch, loss: Loss, safe: SafeCallback | None) -> None:
        self._probe, self._loss, self._safe = probe, loss, safe
        # CPU time, because other work on the machine makes the wall time longer. It does not include a GPU's work.
        self._clock = time.process_time if probe["input_ids"].device.type == "cpu" else time.perf_counter
        self.seconds, self.peak_rss, self.prefix_bytes, self._start, self._frozen = 0.0, 0, 0, 0.0, 0
        self.retained: list[tuple[int, int]] = []
        self.flops: list[tuple[int, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._measure(model, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seconds += self._clock() - self._start
        frozen = len(self._safe.freezer.frozen) if self._safe is not None else 0
        if frozen > self._frozen:
            self._frozen = frozen
            self._measure(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._safe is not None and self._safe.freezer.prefix is not None:
            self.prefix_bytes = self._safe.freezer.prefix.store.bytes
        self.peak_rss = measure.peak_rss()  # before further measurements
        self._measure(model, state.global_step)

    def _measure(self, model: nn.Module, step: int) -> None:
        with _suspended(self._safe):
            self.flops.append((step, measure.step_flops(model, self._probe, self._loss)))
            self.retained.append((step, measure.retained_bytes(model, self._probe, self._loss)))


def _scoring_flops(safe: SafeCallback | None, rows: int) -> int:
    """Return the FLOPs of all scoring steps of a run; `rows` is the number of tokens of a batch."""
    if safe is None or safe.config.score != "cka":
        return 0
    per_block = min(safe.config.block_rows, rows)
    blocks = len(RowBlocks.spread(rows, safe.config.score_blocks, safe.config.block_rows).starts)
    pairs = {adapter.name: cast(LoraAdapter, adapter).pair() for adapter in safe.freezer.adapters}
    costs = {name: blocks * statistics_flop(per_block, B.shape[0], A.shape[0]) for name, (A, B) in pairs.items()}
    return sum(costs[name] for scoring in safe.freezer.ledger.scorings for name in scoring.importance)


def _skipped_flops(safe: SafeCallback | None, model: nn.Module, probe: measure.Batch, loss: Loss) -> int:
    """Return the FLOPs of the frozen blocks that were skipped, since their outputs were known."""
    prefix = None if safe is None else safe.freezer.prefix
    if prefix is None:
        return 0
    tokens = prefix.usage.skipped
    with _suspended(safe):
        flops = measure.block_flops(model, probe, loss, tokens)
    return round(sum(count * flops[block] for block, count in tokens.items()) / probe["input_ids"].numel())


def _suspended(safe: SafeCallback | None) -> AbstractContextManager[Any]:
    """Return a context in which the freezer, if there is one, ignores the model's calls."""
    return nullcontext() if safe is None else safe.freezer.suspended()


class _Lines(TrainerCallback):
    """Shows lines of progress on the console instead of standard output."""

    def __init__(self, label: str, console: Console, safe: SafeCallback | None) -> None:
        self._label, self._console, self._safe = label, console, safe

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        note = f"train ({self._label})  {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}"
        if self._safe is not None:
            freezer = self._safe.freezer
            note += f"  frozen {len(freezer.frozen)}/{len(freezer.adapters)}"
        self._console.print(note, highlight=False, markup=False)


@torch.no_grad()
def _evaluate(trainer: _Trainer, task: str, safe: SafeCallback | None) -> float:
    """Return accuracy, or perplexity per predicted token. A Trainer's eval_loss weights batches by samples instead."""
    gained, units = 0.0, 0
    trainer.model.eval()
    with _suspended(safe):
        for batch in trainer.get_eval_dataloader():
            if task == "seq-cls":
                labels = batch.pop("labels")
                gain, count = float((trainer.model(**batch).logits.argmax(-1) == labels).sum()), len(labels)
            else:
                count = int((batch["labels"][:, 1:] != IGNORED).sum())
                gain = float(trainer.loss(trainer.model, batch)) * count
            gained, units = gained + gain, units + count
    mean = gained / units
    return mean if task == "seq-cls" else math.exp(min(mean, 700.0))


def _report(
    config: FinetuneConfig, model: nn.Module, steps: int, safe: SafeCallback | None, console: Console
) -> FreezeReport:
    title = f"{config.model} on {Path(config.train).name}"
    if safe is None:
        adapters = (AdapterRecord(a.name, sum(p.numel() for p in a.parameters())) for a in live_adapters(model))
        return FreezeReport(title, {"method": config.method}, steps, tuple(adapters))
    try:
        return replace(safe.report(memory=True), model=title)
    except PlanError as error:
        console.print(f"no memory plan: {error}", highlight=False)
        return replace(safe.report(), model=title)
