"""The command `safe-peft plan`: the memory of a training step, before any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option, echo

from ..errors import ConfigError
from ..finetune.config import LOSSES, TASKS, FinetuneConfig, check_dropout
from .finetune import Dropout, Loss, Rank, Saved, Targets, Task, names

DTYPES = ("float32", "bfloat16", "float16")
DEVICE = "Device of the training: cpu, cuda, or auto (this machine's). The plan itself needs no GPU."


def plan(
    model: Annotated[str, Option(help="A folder or a hub id; its weights are not read.")],
    task: Task = "seq-cls",
    batch_size: Annotated[int, Option(help="Samples per batch.")] = 32,
    sequence_length: Annotated[int, Option(help="Tokens per sample.")] = 128,
    padded: Annotated[bool, Option("--padded", help="Samples differ in length, so attention gets a mask.")] = False,
    classes: Annotated[int, Option(help="Classes, for seq-cls.")] = 2,
    dtype: Annotated[str, Option(help=f"Dtype of the model's parameters: {', '.join(DTYPES)}.")] = "float32",
    device: Annotated[str, Option(help=DEVICE)] = "auto",
    loss: Loss = FinetuneConfig.loss,
    r: Rank = 8,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    modules_to_save: Saved = None,
    frozen: Annotated[
        list[str] | None, Option(help="Shell pattern of adapters that are frozen; may be repeated.")
    ] = None,
    frozen_fraction: Annotated[
        float | None, Option(help="Share of the adapters that are frozen, the lowest first.")
    ] = None,
    recompute: Annotated[
        list[str] | None, Option(help="Shell pattern of frozen blocks that run again in backward.")
    ] = None,
    groups: Annotated[bool, Option("--groups", help="List what freezing each group of adapters would free.")] = False,
    json: Annotated[Path | None, Option("--json", help="Write the plan to this file.")] = None,
    picture: Annotated[Path | None, Option(help="Draw the plan into this PNG file.")] = None,
) -> None:
    """Show the memory of a training step, with stock PEFT and with the fast path. No weights are loaded."""
    lora = {"r": r, "lora_dropout": lora_dropout, "target_modules": names(target_modules)}
    if modules_to_save is not None:
        lora["modules_to_save"] = names(modules_to_save)
    if frozen and frozen_fraction is not None:
        raise ConfigError("--frozen and --frozen-fraction: expected one of them, got both; remove one.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    if loss not in LOSSES or (loss == "chunked" and task != "causal-lm"):
        raise ConfigError(f"loss must be one of {', '.join(LOSSES)}, chunked only for causal-lm, got {loss!r}.")
    if classes < 1:
        raise ConfigError(f"classes must be at least 1, got {classes}.")
    check_dropout(lora_dropout)
    import torch

    from ..finetune import models
    from ..loss import BY_NAME
    from ..planning.memory import plan_memory

    with torch.device("meta"):
        shell = models.load_shell(models.locate(model), task, classes, dtype)
        adapted = models.add_adapters(shell, task, lora)
    result = plan_memory(
        adapted,
        batch_size,
        sequence_length,
        frozen=frozen_fraction if frozen_fraction is not None else frozen or (),
        recompute=recompute or (),
        padded=padded,
        device=models.device_name(device),
        loss=BY_NAME[loss],
    )
    result = replace(result, model=model)
    echo(result)
    if groups:
        echo(f"\n{result.groups_table()}")
    if json is not None:
        result.save_json(json)
    if picture is not None:
        result.save_png(picture)
