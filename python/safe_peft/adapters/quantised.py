"""LoRA over quantised base layers: PEFT has a layer type for each quantiser, which all add the same to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor

from safe_kernels import AdapterStatistics

from ..importance import Evidence
from ..swap import original_type
from . import lora
from .base import dotted_name, register_adapter

_HALVES = (torch.float16, torch.bfloat16)


def _dequantise_bnb(base: Any) -> Tensor:
    return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))


_PEFT = "peft.tuners.lora"
DEQUANTISE: dict[str, Callable[[Any], Tensor] | None] = {
    f"{_PEFT}.bnb.Linear8bitLt": _dequantise_bnb,
    f"{_PEFT}.bnb.Linear4bit": _dequantise_bnb,
    f"{_PEFT}.torchao.TorchaoLoraLinear": lambda base: base.weight.dequantize(),
    f"{_PEFT}.hqq.HqqLoraLinear": lambda base: base.dequantize(),
    f"{_PEFT}.gptq.GPTQLoraLinear": None,
    f"{_PEFT}.awq.AwqLoraLinear": None,
    f"{_PEFT}.aqlm.AqlmLoraLinear": None,
}
"""By PEFT's layer type, how to get the base weight back; None where kernels repack it, each in its own way."""


def refusal(layer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Why a call of this layer has to take PEFT's own path.

    Args:
        layer: one of PEFT's LoRA layers for a quantised base.
        args: what the call passes; () when only the layer is asked about.
        kwargs: likewise.
    """
    return lora.refusal(layer, args, kwargs) or _refuse_autocast(args)


def _refuse_autocast(args: tuple[Any, ...]) -> str | None:
    """PEFT casts nothing under autocast (it looks at CUDA's alone), so two halves that differ add up to float32."""
    if args and torch.is_autocast_enabled() and args[0].dtype in _HALVES:
        x, cast = args[0].dtype, torch.get_autocast_dtype("cuda")
        if x != cast:
            return f"input is {str(x).removeprefix('torch.')} under autocast to {str(cast).removeprefix('torch.')}"
    return None


class SafeQuantisedLinear(lora.SafeLoraLinear):
    """The same over a quantised base layer, whose own forward and backward stay as they are."""

    _refusal = staticmethod(refusal)


@register_adapter
class QuantisedLora(lora.LoraAdapter):
    """One LoRA adapter of one layer over a quantised base."""

    layer_type = TorchaoLoraLinear
    layer_names = tuple(DEQUANTISE)
    mixin = SafeQuantisedLinear
    refusal = staticmethod(refusal)

    def evidence(self, statistics: AdapterStatistics | None = None) -> Evidence:
        """What is known about the adapter now; the base weight only by dequantising it."""
        dequantise = DEQUANTISE[dotted_name(original_type(self.layer))]
        base = self.layer.get_base_layer()
        given = None if dequantise is None else partial(dequantise, base)
        return replace(super().evidence(statistics), base_weight=None, dequantise=given)
