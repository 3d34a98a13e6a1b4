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
    """Check that it is a probability, since PEFT treats a negative number or NaN as no dropout."""
    if not (isinstance(p, int | float) and 0.0 <= p <= 1.0):
        raise ConfigError(f"lora_dropout must lie in [0, 1], got {p!r}.")


@dataclass(frozen=True)
class FinetuneConfig:
    """The model, the data and the options of a training; `safe-peft finetune --help` describes them.

    Not all of them are options of the command, or are named as there:

    - `output` may be None, which keeps neither the adapter nor the report.
    - `safe` has options of `SafeConfig`, and `lora` has options of `peft.LoraConfig`, by PEFT's own names.
    - `bottleneck` has options of `safe_peft.bottleneck.BottleneckConfig`, for such adapters instead of LoRA.
    - The learning rate rises over the share `warmup_ratio` of the steps, and then falls linearly to zero.
    - Gradients are clipped to `max_grad_norm`.

    Raises:
        ConfigError: An option has an invalid value.
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
    bottleneck: dict[str, Any] | None = None
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
