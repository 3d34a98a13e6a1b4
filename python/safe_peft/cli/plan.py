"""The command `safe-peft plan`: what a training step will cost in memory, before any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..finetune.config import LOSSES, FinetuneConfig, check_dropout
from .finetune import Dropout, LossName, Rank, Saved, Targets, Task, _names

DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[str, typer.Option(help="A folder or a hub id; its weights stay unread.")]
BatchSize = Annotated[int, typer.Option(help="Rows a batch.")]
Length = Annotated[int, typer.Option(help="Tokens a row.")]
Padded = Annotated[bool, typer.Option("--padded", help="Rows are of different length, so that attention takes a mask.")]
Classes = Annotated[int, typer.Option(help="Classes, for seq-cls.")]
Dtype = Annotated[str, typer.Option(help=f"Of the model's parameters: {', '.join(DTYPES)}.")]
Where = Annotated[
    str, typer.Option(help="Where it will train: cpu, cuda, or auto for what this machine has; a plan needs neither.")
]
Frozen = Annotated[list[str] | None, typer.Option(help="Shell pattern of adapters that are frozen; may be repeated.")]
Share = Annotated[float | None, typer.Option(help="Share of the adapters that are frozen, lowest first.")]
Again = Annotated[list[str] | None, typer.Option(help="Shell pattern of frozen blocks that run again in backward.")]
Groups = Annotated[bool, typer.Option("--groups", help="List what freezing each group of adapters would free.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the plan to this file.")]
Picture = Annotated[Path | None, typer.Option(help="Draw the plan into this PNG file.")]


def plan(
    model: Model,
    task: Task = "seq-cls",
    batch_size: BatchSize = 32,
    sequence_length: Length = 128,
    padded: Padded = False,
    classes: Classes = 2,
    dtype: Dtype = "float32",
    device: Where = "auto",
    loss: LossName = FinetuneConfig.loss,
    r: Rank = 8,
    lora_dropout: Dropout = 0.0,
    target_modules: Targets = "all-linear",
    modules_to_save: Saved = None,
    frozen: Frozen = None,
    frozen_fraction: Share = None,
    recompute: Again = None,
    groups: Groups = False,
    json: Json = None,
    picture: Picture = None,
) -> None:
    """Say where each byte of a training step goes, stock PEFT against ours, without loading weights or training."""
    lora = {"r": r, "lora_dropout": lora_dropout, "target_modules": _names(target_modules)}
    if modules_to_save is not None:
        lora["modules_to_save"] = _names(modules_to_save)
    if frozen and frozen_fraction is not None:
        raise ConfigError("--frozen and --frozen-fraction: expected one of them, got both.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if task not in ("seq-cls", "causal-lm"):
        raise ConfigError(f"task must be one of seq-cls, causal-lm, got {task!r}.")
    if loss not in LOSSES or (loss == "chunked" and task != "causal-lm"):
        raise ConfigError(f"loss must be one of {', '.join(LOSSES)}, chunked for causal-lm alone, got {loss!r}.")
    check_dropout(lora_dropout)
    import torch

    from ..finetune import models
    from ..loss import BY_NAME
    from ..planning.memory import plan_memory

    with torch.device("meta"):
        shell = models.load_shell(models.locate(model), task, classes, dtype)
        adapted = models.add_lora(shell, task, lora)
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
    typer.echo(result)
    if groups:
        typer.echo(f"\n{result.groups_table()}")
    if json is not None:
        result.save_json(json)
    if picture is not None:
        result.save_png(picture)
