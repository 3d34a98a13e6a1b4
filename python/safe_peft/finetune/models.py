"""Base models and their adapters, from a folder or from a hub."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, SafeError, first_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def locate(model: str) -> str:
    """Check that a model is a local folder, or a hub id and not a path, and return the name for transformers."""
    if Path(model).is_dir():
        return str(Path(model))
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: there is no folder {model}; give a folder or a hub id.")
    return model


@contextmanager
def _loading(model: str, what: str) -> Iterator[None]:
    """Turn any error of loading into one sentence."""
    from transformers.utils.hub import is_offline_mode

    try:
        with quiet():
            yield
    except SafeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        offline = not Path(model).exists() and is_offline_mode()
        hint = "; it is not a local folder, and the hub is switched off (HF_HUB_OFFLINE)" if offline else ""
        raise ConfigError(
            f"model: the {what} of {model!r} cannot be loaded{hint} ({reason}). Give a folder, or a reachable hub id."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' load report, bars and warnings, and PEFT's warnings: a new head is intended."""
    from transformers.utils import logging as verbosity

    level, bars = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    verbosity.set_verbosity(logging.ERROR)
    verbosity.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        verbosity.set_verbosity(level)
        if bars:
            verbosity.enable_progress_bar()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that pads; without a padding token it pads with the end-of-text token."""
    from transformers import AutoTokenizer

    with _loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"model: the tokenizer of {source!r} has neither a padding nor an end-of-text token; add one to it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _kind(task: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "seq-cls" else AutoModelForCausalLM


def load_model(source: str, task: str, classes: Sequence[str] | None, pad_id: int) -> PreTrainedModel:
    """Load a base model for a task, in fp32; its configuration gets the classes and the padding token."""
    import torch

    options: dict[str, Any] = {"dtype": torch.float32}
    if task == "seq-cls":
        names = dict(enumerate(classes or ()))
        options |= {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    with _loading(source, "model"):
        model = _kind(task).from_pretrained(source, **options)
    model.config.pad_token_id = pad_id  # classifiers of decoder models need it
    return model


def load_shell(source: str, task: str, classes: int, dtype: str) -> PreTrainedModel:
    """Make a base model from its configuration, on the meta device: it reads no weights and takes no memory."""
    import torch
    from transformers import AutoConfig

    with _loading(source, "configuration"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source)
        if task == "seq-cls":
            config.num_labels = classes
        if getattr(config, "pad_token_id", None) is None:  # classifiers of decoder models need it
            config.pad_token_id = 0
        return _kind(task).from_config(config, dtype=getattr(torch, dtype))


def device_name(name: str) -> str:
    """Return a device's name; "auto" is a GPU if there is one."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def add_adapters(
    model: PreTrainedModel, task: str, lora: Mapping[str, Any], bottleneck: Mapping[str, Any] | None = None
) -> nn.Module:
    """Put PEFT's LoRA on a base model in place, and return the `PeftModel`; PEFT checks the options.

    Args:
        model: the base model.
        task: "seq-cls" or "causal-lm".
        lora: options of LoRA.
        bottleneck: options of bottleneck adapters; if they are given, the model gets these instead of LoRA.

    Raises:
        ConfigError: An option has an invalid value, or the model has no place for the adapters.
    """
    import peft

    from ..bottleneck import BottleneckConfig

    kind = peft.TaskType.SEQ_CLS if task == "seq-cls" else peft.TaskType.CAUSAL_LM
    name, make = ("LoRA", peft.LoraConfig) if bottleneck is None else ("bottleneck", BottleneckConfig)
    try:
        with quiet():
            return peft.get_peft_model(model, make(task_type=kind, **(lora if bottleneck is None else bottleneck)))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{name} options: {first_line(error)}") from error
