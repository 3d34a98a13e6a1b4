"""The supported kinds of adapters, one file each."""

from __future__ import annotations

from . import lora as lora  # each registers its layer types
from . import lora_conv as lora_conv
from . import lora_embedding as lora_embedding
from . import lora_parameter as lora_parameter
from . import quantised as quantised
from .base import Adapter, LayerState, adapter_of, peft_kind, register_adapter
from .score_inputs import Evidence, ScoreInputs

__all__ = ["Adapter", "Evidence", "LayerState", "ScoreInputs", "adapter_of", "peft_kind", "register_adapter"]
