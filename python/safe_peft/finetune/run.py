"""Fine-tuning from files to a PEFT checkpoint and a report, for the command line and the demo."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from ..errors import ConfigError
from ..files.staging import staged
from ..report.records import mebibytes
from ..report.report import FreezeReport
from . import data, models
from .config import FinetuneConfig
from .training import Prepared, train


def finetune(config: FinetuneConfig, console: Console | None = None) -> FreezeReport:
    """Fine-tune adapters, measure the cost, and return the report with one measured run.

    `config.output` gets the files of PEFT's `save_pretrained`, the tokenizer, the report as json, png and html, and in
    `base_config/` the base model's configuration with the class names. The console shows progress; by default it is
    standard error.

    Raises:
        ConfigError: An option, a file or the model is not usable.
        SafeError: The loss is not finite.
    """
    console = console or Console(stderr=True)
    with staged(config.output) if config.output else nullcontext() as stage:
        prepared = _prepare(config)
        report = train(config, prepared, console)
        if stage is not None:
            _save(prepared, report, stage)
    return report


def _prepare(config: FinetuneConfig) -> Prepared:
    """Read and check all inputs before the slow parts begin."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was given, but torch finds no GPU; give cpu, or auto.")
    texts, labels, classes = _read(config)
    source = models.locate(config.model)
    tokenizer = models.load_tokenizer(source)
    torch.manual_seed(config.seed)
    base = models.load_model(source, config.task, classes, int(tokenizer.pad_token_id))
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ConfigError(f"max_length is {config.max_length}, but the model has {limit} positions; lower it.")
    model = models.add_adapters(base, config.task, config.lora, config.bottleneck)
    train, evaluation = (data.tokenize(tokenizer, texts[i], labels[i], config.max_length) for i in range(2))
    return Prepared(model, tokenizer, train, evaluation)


def _read(config: FinetuneConfig) -> tuple[list[list[str]], list[list[int] | None], list[str] | None]:
    files = (config.train, config.eval)
    if config.task == "causal-lm":
        return [data.read_texts(file, config.text_column) for file in files], [None, None], None
    pairs = [data.read_labelled(file, config.text_column, config.label_column) for file in files]
    classes = data.class_names(pairs[0][1])
    indices = [data.class_indices(file, labels, classes) for file, (_, labels) in zip(files, pairs, strict=True)]
    return [texts for texts, _ in pairs], [*indices], classes


def _save(prepared: Prepared, report: FreezeReport, stage: Path) -> None:
    with models.quiet():
        prepared.model.save_pretrained(stage)
        prepared.tokenizer.save_pretrained(stage)
        # PEFT does not save the base model's configuration with the class names. It gets its own folder, since
        # transformers would treat a folder with both as a full model.
        prepared.model.config.save_pretrained(stage / "base_config")
    save_report(report, stage)


def save_report(report: FreezeReport, folder: Path) -> None:
    """Write report.json, report.png and report.html, and memory.png if the report has plans."""
    report.save_json(folder / "report.json")
    report.save_png(folder / "report.png")
    report.save_memory_png(folder / "memory.png")
    report.save_html(folder / "report.html", picture=folder / "report.png")


def result_line(report: FreezeReport) -> str:
    """Return the result of a training in one line."""
    run = report.runs[0]
    start, end = (mebibytes(size) for size in (run.retained[0][1], run.retained[-1][1]))
    return (
        f"{run.metric} {run.value:.4g}; {run.frozen} of {run.adapters} adapters frozen; {end:,.1f} MiB retained per "
        f"step at the end, {start:,.1f} at the start; {run.seconds:,.0f} s"
    )
