"""The supported kinds of adapters."""

from __future__ import annotations

from . import adapterhub as adapterhub  # each registers its layer types
from . import bottleneck as bottleneck
from . import conv as conv
from . import lora as lora
from . import parameters as parameters
from . import quantised as quantised
from . import without_kernel as without_kernel
from .base import Adapter, LayerState, adapter_of, peft_kind, register_adapter
from .score_inputs import Evidence, ScoreInputs

__all__ = ["Adapter", "Evidence", "LayerState", "ScoreInputs", "adapter_of", "peft_kind", "register_adapter"]
