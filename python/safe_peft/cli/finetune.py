"""The command `safe-peft finetune`: its options, and their conversion to a configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..finetune.config import FinetuneConfig
from ..freezing.config import SafeConfig


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel)


DATA, LORA, TRAINING, FREEZING = "Data and model", "LoRA, by PEFT's own names", "Training", "Freezing"
STEPS_OR_SHARE = "optimizer steps (100) or a share of the training (0.2)"
POINTS = ("warmup", "max_warmup", "freeze_end", "freeze_interval", "score_interval")
LISTS = ("target_modules", "modules_to_save")
LORA_OPTIONS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "bias",
    "use_rslora",
    "use_dora",
)

Train = Annotated[str, _option(DATA, "Training file: csv, tsv, jsonl, json or parquet.")]
Eval = Annotated[str, _option(DATA, "Evaluation file with the same columns.", "--eval")]
Output = Annotated[str, _option(DATA, "Folder for the adapter, the tokenizer and the report.")]
Model = Annotated[str, _option(DATA, "A folder or a hub id.")]
Task = Annotated[str, _option(DATA, "seq-cls (measured by accuracy) or causal-lm (by perplexity).")]
TextColumn = Annotated[str, _option(DATA, "Column that holds the text.")]
LabelColumn = Annotated[str, _option(DATA, "Column that holds the class, for seq-cls: strings or integers.")]

Rank = Annotated[int, _option(LORA, "Rank of the adapters.", "--r")]
Alpha = Annotated[int, _option(LORA, "Scaling is alpha / r.")]
Dropout = Annotated[float, _option(LORA, "Dropout before the adapters.")]
Targets = Annotated[str, _option(LORA, "Layers to adapt: all-linear, or name suffixes separated by commas.")]
Saved = Annotated[str | None, _option(LORA, "Further layers to train in full, separated by commas.")]
Bias = Annotated[str, _option(LORA, "Biases to train: none, all or lora_only.")]
RsLora = Annotated[bool, _option(LORA, "Scaling is alpha / sqrt(r).", "--use-rslora")]
Dora = Annotated[bool, _option(LORA, "DoRA; PEFT's path computes it, not the kernels.", "--use-dora")]

Epochs = Annotated[int, _option(TRAINING, "Passes over the training file.")]
MaxSteps = Annotated[int | None, _option(TRAINING, "Optimizer steps, instead of epochs.")]
BatchSize = Annotated[int, _option(TRAINING, "Rows per batch.")]
Rate = Annotated[float, _option(TRAINING, "Peak learning rate of AdamW; it rises, then falls linearly to zero.")]
Decay = Annotated[float, _option(TRAINING, "Weight decay of AdamW.")]
LossName = Annotated[str, _option(TRAINING, "model, or chunked: causal-lm without full logits in memory.")]
MaxLength = Annotated[int, _option(TRAINING, "Texts are truncated to this many tokens.")]
Seed = Annotated[int, _option(TRAINING, "Seed for initial values, the order of batches and dropout.")]
Device = Annotated[str, _option(TRAINING, "auto, cpu or cuda; CUDA_VISIBLE_DEVICES chooses among several GPUs.")]

SCORES = "cka, drift, gradient_sensitivity, progress, random, realised, relative_norm, sensitivity or velocity."
Score = Annotated[str, _option(FREEZING, SCORES)]
Policy = Annotated[str, _option(FREEZING, "greedy, or a control at equal bytes: random_sets, prefix or autofreeze.")]
Fraction = Annotated[
    float | None, _option(FREEZING, "Share to freeze; 0.75 unless --threshold or --memory-budget is given.")
]
Threshold = Annotated[float | None, _option(FREEZING, "Freeze at or below this importance, instead of a share.")]
FreezeBy = Annotated[
    str, _option(FREEZING, "bytes: a share of the bytes that freezing all adapters saves; adapters: of their number.")
]
Target = Annotated[str | None, typer.Option("--target", hidden=True)]  # the old name of --freeze-by
Budget = Annotated[
    str | None, _option(FREEZING, "Bytes that a step may retain at the end (6GiB); freezes by importance per byte.")
]
Recompute = Annotated[str, _option(FREEZING, "Run frozen blocks again in backward: off, frozen (all) or auto.")]
Warmup = Annotated[str, _option(FREEZING, f"Nothing freezes before: {STEPS_OR_SHARE}.")]
MaxWarmup = Annotated[str, _option(FREEZING, "Freezing starts by then, even if importance still changes.")]
End = Annotated[str, _option(FREEZING, "The last freeze event.")]
Interval = Annotated[str, _option(FREEZING, "Between two freeze events.")]
ScoreInterval = Annotated[str, _option(FREEZING, "Between two scoring steps.")]
Never = Annotated[list[str] | None, _option(FREEZING, "Shell pattern of adapters that never freeze; may be repeated.")]
Keep = Annotated[bool, _option(FREEZING, "Leave frozen adapters' dropout on.", "--keep-dropout")]
Prefix = Annotated[
    str | None, _option(FREEZING, "Memory for outputs of the frozen blocks at the bottom (2GiB), which then run once.")
]
PrefixFile = Annotated[str | None, _option(FREEZING, "Further bytes for them in a temporary file.")]
PrefixDropout = Annotated[bool, _option(FREEZING, "Leave the model's own dropout on in these blocks.")]
NonFinite = Annotated[str, _option(FREEZING, "If a score is NaN or Inf: warn and continue, or raise and stop.")]
Method = Annotated[str, _option(FREEZING, "safe, bind (kernels without freezing) or stock (PEFT without changes).")]
NoFreeze = Annotated[bool, typer.Option("--no-freeze", hidden=True)]  # the old name of --method bind


def finetune(
    model: Model,
    train: Train,
    eval: Eval,
    output: Output,
    task: Task = FinetuneConfig.task,
    text_column: TextColumn = FinetuneConfig.text_column,
    label_column: LabelColumn = FinetuneConfig.label_column,
    r: Rank = 8,
    lora_alpha: Alpha = 16,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    modules_to_save: Saved = None,
    bias: Bias = "none",
    use_rslora: RsLora = False,
    use_dora: Dora = False,
    epochs: Epochs = FinetuneConfig.epochs,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = FinetuneConfig.batch_size,
    learning_rate: Rate = FinetuneConfig.learning_rate,
    weight_decay: Decay = FinetuneConfig.weight_decay,
    loss: LossName = FinetuneConfig.loss,
    max_length: MaxLength = FinetuneConfig.max_length,
    seed: Seed = 0,
    device: Device = FinetuneConfig.device,
    method: Method = FinetuneConfig.method,
    score: Score = SafeConfig.score,
    policy: Policy = SafeConfig.policy,
    target_fraction: Fraction = None,
    threshold: Threshold = None,
    freeze_by: FreezeBy = SafeConfig.freeze_by,
    target: Target = None,
    memory_budget: Budget = None,
    recompute: Recompute = SafeConfig.recompute,
    warmup: Warmup = str(SafeConfig.warmup),
    max_warmup: MaxWarmup = str(SafeConfig.max_warmup),
    freeze_end: End = str(SafeConfig.freeze_end),
    freeze_interval: Interval = str(SafeConfig.freeze_interval),
    score_interval: ScoreInterval = str(SafeConfig.score_interval),
    never_freeze: Never = None,
    keep_dropout: Keep = False,
    on_nonfinite: NonFinite = SafeConfig.on_nonfinite,
    prefix_cache: Prefix = None,
    prefix_file: PrefixFile = None,
    prefix_dropout: PrefixDropout = True,
    no_freeze: NoFreeze = False,
) -> None:
    """Fine-tune LoRA adapters on your own text, and freeze the adapters that change least.

    The result is an ordinary PEFT checkpoint, with a report of the freeze events and the savings.
    """
    config = configure(locals())
    from ..finetune.run import finetune as run
    from ..finetune.run import result_line

    typer.echo(result_line(run(config)))
    typer.echo(f"adapter and report: {output}")


def configure(given: Mapping[str, Any]) -> FinetuneConfig:
    """Convert the command's options to a configuration.

    Args:
        given: options by name.

    Returns:
        The configuration.

    Raises:
        ConfigError: An option has an invalid value.

    Example:
        >>> configure({"train": "t.csv", "eval": "e.csv", "model": "my-folder", "warmup": "20"}).safe
        {'warmup': 20}
    """
    options = {name: value for name, value in given.items() if value is not None}
    options |= {name: _point(name, options[name]) for name in POINTS if name in options}
    options |= {name: _names(options[name]) for name in LISTS if name in options}
    if options.get("target"):
        warnings.warn("--target is --freeze-by now, and will be removed.", FutureWarning, stacklevel=2)
        options["freeze_by"] = options["target"]
    if options.get("no_freeze"):
        warnings.warn("--no-freeze is --method bind now, and will be removed.", FutureWarning, stacklevel=2)
        options["method"] = "bind"
    return FinetuneConfig(
        **{field.name: options[field.name] for field in fields(FinetuneConfig) if field.name in options},
        safe={field.name: options[field.name] for field in fields(SafeConfig) if field.name in options},
        lora={name: options[name] for name in LORA_OPTIONS if name in options},
    )


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]


def _point(name: str, text: str) -> int | float:
    """Read a point of the schedule: 100 means steps, 0.2 a share."""
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        raise ConfigError(f"{name} must be {STEPS_OR_SHARE}, got {text!r}.") from None
