"""The kinds of adapters this package knows, one file each, and the only place that imports PEFT."""

from __future__ import annotations

from . import lora as lora  # registers its layer type
from . import quantised as quantised  # likewise
from .base import Adapter, LayerState, adapter_of, peft_kind, register_adapter

__all__ = ["Adapter", "LayerState", "adapter_of", "peft_kind", "register_adapter"]
