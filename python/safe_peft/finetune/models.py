"""Base models and their LoRA adapters, from a folder or from a hub."""

from __future__ import annotations

import logging
import os
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
    """Find a model: a local folder, or a hub id.

    Args:
        model: the folder or id.

    Returns:
        The name that transformers loads.

    Raises:
        ConfigError: The name is a path, but there is no such folder.

    Example:
        >>> locate("meta-llama/Llama-3.2-1B")
        'meta-llama/Llama-3.2-1B'
    """
    if Path(model).is_dir():
        return str(Path(model))
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"model: there is no folder {model}; give a folder or a hub id.")
    return model


@contextmanager
def _loading(model: str, what: str) -> Iterator[None]:
    """Turn any error of loading into one sentence."""
    try:
        with quiet():
            yield
    except SafeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        hint = "; it is not a local folder, and the hub is off" if not Path(model).exists() and _is_offline() else ""
        raise ConfigError(
            f"model: the {what} of {model!r} cannot be loaded{hint} ({reason}). Give a folder, or a reachable hub id."
        ) from error


def _is_offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


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
    """Load a tokenizer that pads; without a padding token it pads with the end-of-text token.

    Args:
        source: as `locate` returns it.

    Raises:
        ConfigError: It cannot be loaded.
    """
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


def load_model(source: str, task: str, classes: Sequence[str] | None, pad_id: int) -> PreTrainedModel:
    """Load a base model for a task, in fp32.

    Args:
        source: as `locate` returns it.
        task: "seq-cls" or "causal-lm".
        classes: names of the classes, kept in the configuration, for "seq-cls".
        pad_id: the tokenizer's padding token, which classifiers of decoder models need.

    Raises:
        ConfigError: The model cannot be loaded for this task.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": torch.float32}
    if task == "seq-cls":
        names = dict(enumerate(classes or ()))
        options |= {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    kind = AutoModelForSequenceClassification if task == "seq-cls" else AutoModelForCausalLM
    with _loading(source, "model"):
        model = kind.from_pretrained(source, **options)
    model.config.pad_token_id = pad_id
    return model


def device_name(name: str) -> str:
    """Return a device's name; "auto" is a GPU if there is one.

    Args:
        name: the value of the option.

    Example:
        >>> device_name("cpu")
        'cpu'
    """
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_shell(source: str, task: str, classes: int = 2, dtype: str = "float32") -> PreTrainedModel:
    """Make a base model from its configuration, on the meta device: it reads no weights and takes no memory.

    Args:
        source: as `locate` returns it.
        task: "seq-cls" or "causal-lm".
        classes: for "seq-cls".
        dtype: torch's name of the parameters' dtype.

    Raises:
        ConfigError: The configuration does not exist, or does not suit the task.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    kinds = {"seq-cls": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}
    with _loading(source, "configuration"), torch.device("meta"):
        config = AutoConfig.from_pretrained(source)
        if task == "seq-cls":
            config.num_labels = classes
        if getattr(config, "pad_token_id", None) is None:  # classifiers of decoder models need it
            config.pad_token_id = 0
        return kinds[task].from_config(config, dtype=getattr(torch, dtype))


def add_lora(model: PreTrainedModel, task: str, options: Mapping[str, Any]) -> nn.Module:
    """Put PEFT's LoRA on a model.

    Args:
        model: the base model; PEFT changes it in place.
        task: "seq-cls" or "causal-lm".
        options: of `peft.LoraConfig`, by PEFT's own names.

    Returns:
        The `PeftModel`.

    Raises:
        ConfigError: PEFT refuses the options.
    """
    import peft

    kind = peft.TaskType.SEQ_CLS if task == "seq-cls" else peft.TaskType.CAUSAL_LM
    try:
        with quiet():
            return peft.get_peft_model(model, peft.LoraConfig(task_type=kind, **options))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"LoRA options: {first_line(error)}") from error


def positions(model: PreTrainedModel) -> int | None:
    """Return the number of positions of a model, or None if its configuration has none.

    Args:
        model: the base model.
    """
    return getattr(model.config, "max_position_embeddings", None)
