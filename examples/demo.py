"""MiniLM on film reviews: stock PEFT, SAFE, and adapters that are frozen at random, on the same batches.

    python examples/demo.py --rows 640

Each training is a process of its own, `safe-peft finetune`, so that the peak of its memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from assets import fetch, load_film_reviews
from rich.console import Console
from typer import Option

from safe_peft.cli.main import clear_errors
from safe_peft.errors import ConfigError, SafeError
from safe_peft.files.staging import staged
from safe_peft.finetune.run import save_report
from safe_peft.report.report import FreezeReport
from safe_peft.report.tables import plans_table, runs_table, verdict

METHODS = {
    "stock": ["--method", "stock"],
    "bind": ["--method", "bind"],
    "safe": [],
    "count": ["--freeze-by", "adapters"],
    "random": ["--policy", "random_sets"],
    "cached": ["--prefix-cache", "1GiB", "--no-prefix-dropout"],
}
LINEAR_LAYERS = {
    "minilm": "query,key,value,attention.output.dense,intermediate.dense,output.dense",
    "mpnet": "attn.q,attn.k,attn.v,attn.o,intermediate.dense,output.dense",
}
CLASSES = ("negative", "positive")


@clear_errors
def demo(
    output: Annotated[str, Option(help="Folder for the report.")] = "runs/demo",
    model: Annotated[str, Option(help="minilm, mpnet, a folder or a hub id.")] = "minilm",
    methods: Annotated[str, Option(help=f"Some of {', '.join(METHODS)}, separated by commas.")] = "stock,safe,random",
    rows: Annotated[int, Option(help="Training sentences.", min=1, max=8566)] = 1440,
    test_rows: Annotated[int, Option(help="Test sentences.", min=1, max=2000)] = 2000,
    epochs: Annotated[int, Option(help="Passes over the training sentences.")] = 1,
    batch_size: Annotated[int, Option(help="Rows per batch.")] = 32,
    max_length: Annotated[int, Option(help="A text is cut after this many tokens.")] = 64,
    learning_rate: Annotated[float, Option(help="Peak of AdamW; 3e-3 is stock PEFT's best.")] = 3e-3,
    lora_dropout: Annotated[float, Option(help="Dropout before the adapters.")] = 0.1,
    bottleneck: Annotated[float | None, Option(help="Bottleneck adapters instead, of hidden size / this.")] = None,
    target_fraction: Annotated[float, Option(help="Share of the bytes, or the adapters, to freeze.")] = 0.75,
    seed: Annotated[int, Option(help="First seed.")] = 0,
    seeds: Annotated[int, Option(help="Repeat with this many seeds: mean and standard deviation.", min=1)] = 1,
) -> None:
    """Compare stock PEFT, SAFE and freezing at random on film reviews; takes minutes."""
    options = {
        "model": fetch(model) if model in LINEAR_LAYERS else model,
        "target-modules": LINEAR_LAYERS.get(model, "all-linear"),
        "epochs": epochs,
        "batch-size": batch_size,
        "max-length": max_length,
        "learning-rate": learning_rate,
        "lora-dropout": lora_dropout,
        "target-fraction": target_fraction,
    }
    if bottleneck is not None:
        options |= {"bottleneck": bottleneck, "target-modules": "all-linear"}
    names = checked(methods)
    with staged(output) as stage, tempfile.TemporaryDirectory() as folder:
        write_sentences(Path(folder), rows, test_rows)
        options |= {"train": Path(folder, "train.jsonl"), "eval": Path(folder, "test.jsonl")}
        reports = []
        for one in range(seed, seed + seeds):
            for name in names:
                Console(stderr=True).print(f"{name}, seed {one}", highlight=False)
                reports.append(train(options | {"seed": one, "output": Path(folder, f"{name}-{one}")}, name))
        report = replace(combine(reports), model=f"{model} on film reviews")
        save_report(report, stage)
    show(report)
    print(f"report: {Path(output, 'report.html')}")


def checked(methods: str) -> list[str]:
    """Return the names of methods, and raise ConfigError if one of them is unknown or occurs twice."""
    names = [name.strip() for name in methods.split(",")]
    if not set(names) <= METHODS.keys() or len(set(names)) < len(names):
        raise ConfigError(f"methods must be some of {', '.join(METHODS)}, each once; got {methods!r}.")
    return names


def write_sentences(folder: Path, rows: int, test_rows: int) -> None:
    """Write train.jsonl and test.jsonl."""
    train, test = load_film_reviews()
    for name, examples in (("train", train[:rows]), ("test", test[:test_rows])):
        lines = [json.dumps({"text": text, "label": CLASSES[label]}) + "\n" for text, label in examples]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def command(options: dict[str, object], method: str) -> list[str]:
    """Return the command of one training."""
    given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "safe_peft.cli.main", "finetune", *given, *METHODS[method]]


def train(options: dict[str, object], method: str) -> FreezeReport:
    """Train in a process of its own, and return the report."""
    # On a busy machine, threads wait for each other; waiting must not count as processor time.
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}
    code = subprocess.run(command(options, method), stdout=sys.stderr, env=env, check=False).returncode
    if code:
        why = "was killed: memory may be short, so give a smaller --batch-size" if code == -9 else "failed"
        raise SafeError(f"the training with method {method} {why}.")
    return FreezeReport.load(Path(str(options["output"]), "report.json"))


def combine(reports: Sequence[FreezeReport]) -> FreezeReport:
    """Return the report of the first SAFE run, or else of the first run, with all measured runs in it."""
    shown = next((report for report in reports if report.runs[0].method == "safe"), reports[0])
    return replace(shown, runs=tuple(run for report in reports for run in report.runs))


def show(report: FreezeReport) -> None:
    """Print the tables."""
    print(runs_table(report.runs, f"{report.model}, {report.total_steps} steps per run"))
    print(verdict(report.runs))
    if report.plans:
        print(plans_table(report.plans))


if __name__ == "__main__":
    typer.run(demo)
