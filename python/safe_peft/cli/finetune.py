"""The command `safe-peft finetune`: its options, and their conversion to a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..finetune.config import FinetuneConfig as Run
from ..freezing.config import POINTS
from ..freezing.config import SafeConfig as Safe


def _panel(panel: str) -> Callable[..., Any]:
    """Return a function that makes an option of one panel of the help, from its text and, if needed, its names."""

    def option(text: str, *names: str) -> Any:
        return typer.Option(*names, help=text, rich_help_panel=panel)

    return option


data, lora, training = _panel("Data and model"), _panel("LoRA, by PEFT's own names"), _panel("Training")
freezing, hidden = _panel("Freezing"), partial(typer.Option, hidden=True)
STEPS_OR_SHARE = "optimizer steps (100) or a share of the training (0.2)"
LISTS = ("target_modules", "modules_to_save")
LORA_ONLY = {"r": 8, "lora_alpha": 16, "bias": "none", "use_rslora": False, "use_dora": False}
LORA_OPTIONS = (*LORA_ONLY, "lora_dropout", *LISTS)
BOTTLENECK = "Bottleneck adapters instead of LoRA, such as 16: hidden size / bottleneck size."
SCORES = "cka, drift, gradient_sensitivity, progress, random, realised, relative_norm, sensitivity or velocity."
BY = "Meaning of the share. bytes: of the bytes that freezing all adapters saves; adapters: of their number."
BUDGET = "Bytes that a step may retain at the end of freezing, such as 6GiB."
PREFIX = "Memory for outputs of the lowest, frozen blocks, such as 2GiB; later epochs skip these blocks."

# `safe-peft plan` has these options too.
Task = Annotated[str, data("seq-cls (measured by accuracy) or causal-lm (by perplexity).")]
Rank = Annotated[int, lora("Rank of the adapters.", "--r")]
Dropout = Annotated[float, lora("Dropout before the adapters.")]
Targets = Annotated[str, lora("Layers to adapt: all-linear, or name suffixes separated by commas.")]
Saved = Annotated[str | None, lora("Further layers to train in full, separated by commas.")]
Loss = Annotated[str, training("model: its own loss; chunked: for causal-lm, without the full logits in memory.")]


def finetune(
    model: Annotated[str, data("Base model: a folder or a hub id.")],
    train: Annotated[str, data("Training file: csv, tsv, jsonl, json or parquet.")],
    eval: Annotated[str, data("Evaluation file with the same columns.", "--eval")],
    output: Annotated[str, data("Folder for the adapter, the tokenizer and the report.")],
    task: Task = Run.task,
    text_column: Annotated[str, data("Column with the text.")] = Run.text_column,
    label_column: Annotated[str, data("Column with the class, for seq-cls: strings or integers.")] = Run.label_column,
    r: Rank = 8,
    lora_alpha: Annotated[int, lora("Scaling is alpha / r.")] = 16,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    modules_to_save: Saved = None,
    bias: Annotated[str, lora("Biases to train: none, all or lora_only.")] = "none",
    use_rslora: Annotated[bool, lora("Scaling is alpha / sqrt(r).", "--use-rslora")] = False,
    use_dora: Annotated[bool, lora("DoRA: a magnitude per output feature trains too.", "--use-dora")] = False,
    bottleneck: Annotated[float | None, lora(BOTTLENECK)] = None,
    epochs: Annotated[int, training("Passes over the training file.")] = Run.epochs,
    max_steps: Annotated[int | None, training("Number of optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, training("Samples per batch.")] = Run.batch_size,
    learning_rate: Annotated[
        float, training("Peak learning rate of AdamW; it rises, then falls linearly to zero.")
    ] = Run.learning_rate,
    weight_decay: Annotated[float, training("Weight decay of AdamW.")] = Run.weight_decay,
    loss: Loss = Run.loss,
    max_length: Annotated[int, training("Texts are truncated to this many tokens.")] = Run.max_length,
    seed: Annotated[int, training("Seed for initial values, the order of batches and dropout.")] = 0,
    device: Annotated[
        str, training("auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several GPUs.")
    ] = Run.device,
    method: Annotated[
        str, freezing("safe, bind (the fast path without freezing) or stock (PEFT without changes).")
    ] = Run.method,
    score: Annotated[str, freezing(f"Measure of importance: {SCORES}")] = Safe.score,
    policy: Annotated[
        str, freezing("Which adapters freeze: greedy, or a control at equal bytes: random_sets, prefix or autofreeze.")
    ] = Safe.policy,
    target_fraction: Annotated[
        float | None, freezing("Share to freeze; 0.75 unless --threshold or --memory-budget is given.")
    ] = None,
    threshold: Annotated[
        float | None, freezing("Freeze adapters with at most this importance, instead of a share.")
    ] = None,
    freeze_by: Annotated[str, freezing(BY)] = Safe.freeze_by,
    target: Annotated[str | None, hidden("--target")] = None,  # the old name of --freeze-by
    memory_budget: Annotated[str | None, freezing(BUDGET)] = None,
    recompute: Annotated[
        str, freezing("Frozen blocks that run again in backward: off, frozen (all) or auto (what the budget needs).")
    ] = Safe.recompute,
    warmup: Annotated[str, freezing(f"Nothing freezes before this point: {STEPS_OR_SHARE}.")] = str(Safe.warmup),
    max_warmup: Annotated[str, freezing("Freezing begins here at the latest, even if importance still changes.")] = str(
        Safe.max_warmup
    ),
    freeze_end: Annotated[str, freezing("Point of the last freeze event.")] = str(Safe.freeze_end),
    freeze_interval: Annotated[str, freezing("Distance between two freeze events.")] = str(Safe.freeze_interval),
    score_interval: Annotated[str, freezing("Distance between steps that measure importance.")] = str(
        Safe.score_interval
    ),
    never_freeze: Annotated[
        list[str] | None, freezing("Shell pattern of adapters that never freeze; may be repeated.")
    ] = None,
    keep_dropout: Annotated[bool, freezing("Leave frozen adapters' dropout on.", "--keep-dropout")] = False,
    on_nonfinite: Annotated[
        str, freezing("If a score is NaN or Inf: warn and continue, or raise and stop.")
    ] = Safe.on_nonfinite,
    prefix_cache: Annotated[str | None, freezing(PREFIX)] = None,
    prefix_file: Annotated[str | None, freezing("Further bytes for these outputs, in a temporary file.")] = None,
    prefix_dropout: Annotated[bool, freezing("Leave the model's own dropout on in the skipped blocks.")] = True,
    no_freeze: Annotated[bool, hidden("--no-freeze")] = False,  # the old name of --method bind
) -> None:
    """Fine-tune adapters on your own text, and freeze the least important ones.

    The result is an ordinary PEFT checkpoint, with a report of the freeze events and the savings.
    """
    config = configure(locals())
    from ..finetune.run import finetune as run
    from ..finetune.run import result_line

    typer.echo(result_line(run(config)))
    typer.echo(f"adapter and report: {output}")


def configure(given: Mapping[str, Any]) -> Run:
    """Convert the command's options to a configuration.

    Example:
        >>> configure({"train": "t.csv", "eval": "e.csv", "model": "my-folder", "warmup": "20"}).safe
        {'warmup': 20}
    """
    options = {name: value for name, value in given.items() if value is not None}
    options |= {name: _point(name, options[name]) for name in POINTS if name in options}
    options |= {name: names(options[name]) for name in LISTS if name in options}
    if options.get("target"):
        warnings.warn("--target is --freeze-by now, and will be removed.", FutureWarning, stacklevel=2)
        options["freeze_by"] = options["target"]
    if options.get("no_freeze"):
        warnings.warn("--no-freeze is --method bind now, and will be removed.", FutureWarning, stacklevel=2)
        options["method"] = "bind"
    factor = options.pop("bottleneck", None)
    return Run(
        **{field.name: options[field.name] for field in fields(Run) if field.name in options},
        safe={field.name: options[field.name] for field in fields(Safe) if field.name in options},
        lora={name: options[name] for name in LORA_OPTIONS if name in options},
        bottleneck=None if factor is None else _bottleneck(factor, options),
    )


def _bottleneck(factor: float, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of bottleneck adapters; "all-linear" leaves their positions to the model's structure."""
    for name, default in LORA_ONLY.items():
        if options.get(name, default) != default:
            flag = name.replace("_", "-")
            raise ConfigError(f"--bottleneck and --{flag}: {flag} is for LoRA; expected one of them, got both.")
    found = {name: options[name] for name in LISTS if options.get(name, "all-linear") != "all-linear"}
    return {"reduction_factor": factor, "dropout": options.get("lora_dropout", 0.0), **found}


def names(text: str) -> str | list[str]:
    """Read names that are separated by commas; "all-linear" means all of PEFT's choice."""
    return text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]


def _point(name: str, text: str) -> int | float:
    """Read a point of the schedule: 100 means steps, 0.2 a share."""
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise ConfigError(f"{name} must be {STEPS_OR_SHARE}, got {text!r}.") from None
