"""The demo: MiniLM on film reviews, on the same batches: stock PEFT, SAFE, and adapters that are frozen at random."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from ..errors import ConfigError
from ..files.staging import staged
from ..finetune import assets
from ..finetune.config import FinetuneConfig, check_dropout
from ..finetune.run import save_report
from ..report.records import RunRecord
from ..report.report import FreezeReport
from .worker import run_isolated

METHODS = ("stock", "bind", "safe", "bytes", "random")
LINEAR_LAYERS = {
    "minilm": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "mpnet": ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"],
}
CLASSES = ("negative", "positive")


@dataclass(frozen=True)
class DemoConfig:
    """What the demo compares, and on how much.

    Args:
        output: the folder for report.json, report.png and report.html.
        model: "minilm", "mpnet", a folder or a hub id.
        methods: which of "stock", "bind", "safe", "bytes" and "random" to run, in this order.
        rows: training sentences, at most 8,566.
        test_rows: held-out sentences, at most 2,000.
        epochs: passes over the training sentences.
        seed: the first seed.
        seeds: how many seeds to repeat everything over.
        batch_size: rows per batch.
        learning_rate: of AdamW.
        lora_dropout: of the adapters.
        target_fraction: share of the adapters that "safe" and "random" freeze, and of the bytes that "bytes" frees.

    Raises:
        ConfigError: An option has a value that cannot work.

    Example:
        >>> DemoConfig("runs/demo").methods
        ('stock', 'safe', 'random')
    """

    output: str
    model: str = "minilm"
    methods: tuple[str, ...] = ("stock", "safe", "random")
    rows: int = 5120
    test_rows: int = 2000
    epochs: int = 1
    seed: int = 0
    seeds: int = 1
    batch_size: int = 32
    learning_rate: float = 2e-3
    lora_dropout: float = 0.1
    target_fraction: float = 0.75

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(
                f"methods must be some of {', '.join(METHODS)}, each once; got {', '.join(self.methods)}."
            )
        for name, most in (("rows", 8566), ("test_rows", 2000), ("seeds", 100)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must lie between 1 and {most:,}, got {getattr(self, name):,}.")
        check_dropout(self.lora_dropout)


def demo(config: DemoConfig, console: Console | None = None) -> FreezeReport:
    """Run the comparison and write its report.

    Args:
        config: what to compare.
        console: where the course of it is told; standard error by default.

    Returns:
        The report of the first SAFE run (of the first run, if SAFE is not among the methods), with every measured run.

    Raises:
        ConfigError: An option cannot work, or the output cannot be written.
        AssetError: The model or the sentences cannot be fetched.
        SafeError: A run failed.

    Example:
        >>> demo(DemoConfig("runs/demo", rows=640))  # doctest: +SKIP
    """
    console = console or Console(stderr=True)
    with staged(config.output) as stage, tempfile.TemporaryDirectory() as folder:
        _write_sentences(config, Path(folder))
        reports = _run_all(config, Path(folder), console)
        report = _combine(reports)
        save_report(report, stage)
    return report


def _write_sentences(config: DemoConfig, folder: Path) -> None:
    train, test = assets.load_film_reviews()
    for name, examples in (("train", train[: config.rows]), ("test", test[: config.test_rows])):
        lines = [json.dumps({"text": text, "label": CLASSES[label]}) for text, label in examples]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_all(config: DemoConfig, folder: Path, console: Console) -> list[FreezeReport]:
    plan = [(seed, method) for seed in range(config.seed, config.seed + config.seeds) for method in config.methods]
    reports = []
    for number, (seed, method) in enumerate(plan, 1):
        console.print(f"run {number} of {len(plan)}: {method}, seed {seed}", highlight=False)
        reports.append(run_isolated(run_config(config, folder, method, seed)))
    return reports


def run_config(config: DemoConfig, folder: Path, method: str, seed: int) -> FinetuneConfig:
    """Return the options of one run; runs of one seed differ in the method alone.

    Args:
        config: the demo's options.
        folder: holds train.jsonl and test.jsonl.
        method: "stock", "bind", "safe", "bytes" or "random".
        seed: of this run.

    Example:
        >>> run_config(DemoConfig("out"), Path("."), "random", 0).safe["score"]
        'random'
    """
    safe = {
        "target_fraction": config.target_fraction,
        "target": "bytes" if method == "bytes" else "adapters",
        "score": "random" if method == "random" else "cka",
        "seed": seed,
    }
    targets = LINEAR_LAYERS.get(config.model, "all-linear")
    return FinetuneConfig(
        model=config.model,
        train=str(folder / "train.jsonl"),
        eval=str(folder / "test.jsonl"),
        method="safe" if method in ("bytes", "random") else method,
        safe=safe,
        lora={"r": 8, "lora_alpha": 16, "lora_dropout": config.lora_dropout, "target_modules": targets},
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        max_length=64,
        seed=seed,
        title=f"{config.model} on film reviews",
    )


def _combine(reports: Sequence[FreezeReport]) -> FreezeReport:
    runs: tuple[RunRecord, ...] = tuple(run for report in reports for run in report.runs)
    shown = next((report for report in reports if report.runs[0].method == "safe"), reports[0])
    return replace(shown, runs=runs)
