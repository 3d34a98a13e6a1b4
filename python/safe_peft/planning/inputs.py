"""The shapes of a training batch: for a model that was not called yet, or from a batch of the training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.wrappers import parameters_of
from ..errors import PlanError

_ROW_LABELS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification", "ForMultipleChoice")
_TOKEN_LABELS = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification")


@dataclass(frozen=True)
class InputSpec:
    """One tensor of a batch; the dtype is torch's name, such as "int64"."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Inputs:
    """A batch without values, as JSON values.

    Args:
        tensors: by the name of the model's argument.
        constants: arguments that are numbers, strings, booleans or None.
        padded: whether some samples are padded; then attention does not drop its mask.
        autocast: torch's name of the autocast dtype of the call; "" for the autocast around the plan, if any.
        source: path of the called module; "" for the model itself.
        further: the other calls before backward: another tower, or the same one with the other half of a pair.
    """

    tensors: dict[str, InputSpec]
    constants: dict[str, Any] = field(default_factory=dict)
    padded: bool = False
    autocast: str = ""
    source: str = ""
    further: tuple[Inputs, ...] = ()

    @property
    def calls(self) -> tuple[Inputs, ...]:
        """Every call of a step, this call first."""
        return self, *self.further

    @property
    def rows(self) -> int:
        """Samples per batch."""
        return next((spec.shape[0] for spec in self.tensors.values() if spec.shape), 0)

    @property
    def elements(self) -> int:
        """The sum, over the calls, of the elements of the largest tensor: a larger batch retains more."""
        return sum(max((math.prod(spec.shape) for spec in call.tensors.values()), default=0) for call in self.calls)

    def make(self, device: torch.device) -> dict[str, Any]:
        """Return the model's arguments, inside a `FakeTensorMode`."""
        tensors = {
            name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
            for name, spec in self.tensors.items()
        }
        return {**tensors, **self.constants}

    @classmethod
    def of(
        cls, batch: Mapping[str, Any], *, padded: bool | None = None, autocast: bool = False, source: str = ""
    ) -> Inputs:
        """Describe a real batch: its tensors and plain constants, and the current autocast on request.

        A mask without padding is omitted, because attention ignores it. Without `padded`, the masks are read.

        Example:
            >>> Inputs.of({"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}).tensors
            {'input_ids': InputSpec(shape=(2, 3), dtype='int64')}
        """
        masks = {name: v for name, v in batch.items() if isinstance(v, Tensor) and name.endswith("attention_mask")}
        if padded is None:
            padded = any(bool((mask == 0).any()) for mask in masks.values())
        tensors = {
            name: InputSpec(tuple(value.shape), _name(value.dtype))
            for name, value in batch.items()
            if isinstance(value, Tensor) and (padded or name not in masks)
        }
        plain = {n: v for n, v in batch.items() if isinstance(v, bool | int | float | str)}
        device = next((value.device.type for value in batch.values() if isinstance(value, Tensor)), "cpu")
        enabled = autocast and torch.is_autocast_enabled(device)
        return cls(tensors, plain, padded, _name(torch.get_autocast_dtype(device)) if enabled else "", source)


def largest(batch: Mapping[str, Any]) -> int:
    """Return the number of elements of a batch's largest tensor."""
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)


def inputs_for(model: nn.Module, batch_size: int, sequence_length: int | None, *, padded: bool = False) -> Inputs:
    """Return the shapes of a batch that trains a transformers model, or a PEFT model around one.

    Encoder and decoder have the same sequence length; images have the size of the model's config.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
        >>> inputs_for(model, 8, 128).tensors["input_ids"].shape
        (8, 128)
    """
    base = getattr(model, "get_base_model", lambda: model)()
    config = getattr(base, "config", None)
    main = getattr(base, "main_input_name", None)
    if config is None or main not in ("input_ids", "pixel_values"):
        raise PlanError(
            f"{type(base).__name__} takes {main or 'inputs that it does not declare'}, and a plan cannot create these; "
            "pass a batch: plan_memory(model, batch=...)."
        )
    samples = _checked_size("batch_size", batch_size)
    if main == "pixel_values":
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        dtype = next((_name(p.dtype) for p in parameters_of(base) if p.is_floating_point()), "float32")
        image = InputSpec((samples, getattr(config, "num_channels", 3), *sides), dtype)
        return Inputs({main: image, **_labels(base, samples, None)})
    tokens, limit = _checked_size("sequence_length", sequence_length), getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit > 0:
        raise PlanError(f"sequence_length: expected at most the model's {limit} positions, got {tokens}.")
    ids = InputSpec((samples, tokens), "int64")
    tensors = {main: ids} | ({"attention_mask": ids} if padded else {})
    tensors |= _labels(base, samples, ids)
    if getattr(config, "is_encoder_decoder", False) and "labels" not in tensors:
        tensors["decoder_input_ids"] = ids
    return Inputs(tensors, padded=padded)


def _labels(base: nn.Module, rows: int, ids: InputSpec | None) -> dict[str, InputSpec]:
    name = type(base).__name__
    if "labels" not in inspect.signature(base.forward).parameters:
        return {}
    if any(kind in name for kind in _ROW_LABELS):
        return {"labels": InputSpec((rows,), "int64")}
    return {"labels": ids} if ids is not None and any(kind in name for kind in _TOKEN_LABELS) else {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name}: expected an int of at least 1, got {value!r}.")
    return value
