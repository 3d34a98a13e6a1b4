"""The options of a fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..freezing.config import SafeConfig

TASKS = ("seq-cls", "causal-lm")
METHODS = ("stock", "bind", "safe")
LOSSES = ("model", "chunked")
DEVICES = ("auto", "cpu", "cuda")


def check_dropout(p: Any) -> None:
    """Check that it is a probability, since PEFT treats a negative number or NaN as no dropout.

    Args:
        p: LoRA's dropout.

    Raises:
        ConfigError: It is not a number in [0, 1].
    """
    if not (isinstance(p, int | float) and 0.0 <= p <= 1.0):
        raise ConfigError(f"lora_dropout must lie in [0, 1], got {p!r}.")


@dataclass(frozen=True)
class FinetuneConfig:
    """The model, the data and the options of a training.

    Args:
        model: a folder or a hub id.
        train: the training file (csv, tsv, jsonl, json or parquet).
        eval: the evaluation file.
        output: folder for the adapter and the report; None keeps neither.
        task: "seq-cls" (accuracy) or "causal-lm" (perplexity).
        text_column: the text's column in both files.
        label_column: the label's column, for "seq-cls".
        method: "safe" freezes adapters, "bind" only uses the fast path, "stock" is PEFT without changes.
        safe: options of `SafeConfig`.
        lora: options of `peft.LoraConfig`, by PEFT's own names.
        epochs: passes over the training file.
        max_steps: optimizer steps, instead of epochs.
        batch_size: rows per batch.
        learning_rate: AdamW's peak, reached after `warmup_ratio` of the steps; then it falls linearly to zero.
        weight_decay: AdamW's weight decay.
        warmup_ratio: share of the steps over which the learning rate rises.
        max_grad_norm: gradients are clipped to this norm.
        loss: "model" for the model's own loss, or "chunked" for the same without full logits in memory ("causal-lm").
        max_length: texts are truncated to this many tokens.
        seed: for the initial values of head and adapters, the order of batches and dropout.
        device: "cpu", "cuda", or "auto" for a GPU if there is one. CUDA_VISIBLE_DEVICES chooses among several.

    Raises:
        ConfigError: An option has an invalid value.

    Example:
        >>> FinetuneConfig("my-folder", "train.csv", "eval.csv").task
        'seq-cls'
    """

    model: str
    train: str
    eval: str
    output: str | None = None
    task: str = "seq-cls"
    text_column: str = "text"
    label_column: str = "label"
    method: str = "safe"
    safe: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    loss: str = "model"
    max_length: int = 128
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("method", METHODS), ("loss", LOSSES), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.loss == "chunked" and self.task != "causal-lm":
            raise ConfigError(f"loss: chunked needs task causal-lm, whose logits are large; got {self.task}.")
        for name, least in (("epochs", 1), ("batch_size", 1), ("max_length", 2), ("max_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"learning_rate must be a number above 0, got {self.learning_rate}.")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ConfigError(f"warmup_ratio must lie in [0, 1], got {self.warmup_ratio}.")
        check_dropout(self.lora.get("lora_dropout", 0.0))
        SafeConfig.from_dict(self.safe)

    @property
    def label(self) -> str:
        """The method's name in reports; freezing at random is a control, not the method."""
        if self.method != "safe":
            return self.method
        if self.safe.get("score") == "random" or self.safe.get("policy") == "random_sets":
            return "random"
        if self.safe.get("prefix_cache") or self.safe.get("prefix_file"):
            return "cached"
        return "count" if self.safe.get("freeze_by") == "adapters" else "safe"
