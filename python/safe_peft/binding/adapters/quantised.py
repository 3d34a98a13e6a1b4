"""LoRA over quantised base layers. PEFT has a layer type per quantiser, and all add the adapter in the same way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor

from ..class_swap import original_type
from . import lora
from .base import dotted_name, register_adapter

logger = logging.getLogger(__name__)
_QUANTISES_INPUT = ("act_quant_kwargs", "input_quant_func")  # attributes of torchao, in newer and older releases
_HALVES = (torch.float16, torch.bfloat16)


def _is_packed(weight: Any) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _dequantise_bnb(base: Any) -> Tensor | None:
    if _is_packed(base.weight):
        return None  # bitsandbytes would dequantise it in the order of an unpacked weight
    return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))


def _dequantise_torchao(base: Any) -> Tensor | None:
    try:
        return base.weight.dequantize()
    except NotImplementedError:
        return None  # older releases, for weights whose inputs are quantised too


_PEFT = "peft.tuners.lora"
DEQUANTISE: dict[str, Callable[[Any], Tensor | None] | None] = {
    f"{_PEFT}.bnb.Linear8bitLt": _dequantise_bnb,
    f"{_PEFT}.bnb.Linear4bit": _dequantise_bnb,
    f"{_PEFT}.torchao.TorchaoLoraLinear": _dequantise_torchao,
    f"{_PEFT}.hqq.HqqLoraLinear": lambda base: base.dequantize(),
    f"{_PEFT}.gptq.GPTQLoraLinear": None,
    f"{_PEFT}.awq.AwqLoraLinear": None,
    f"{_PEFT}.aqlm.AqlmLoraLinear": None,
}
"""By PEFT's layer type, a function that dequantises the base weight; None if the quantiser's kernels repack it."""


def refusal(layer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return why a call of this layer must take PEFT's own path; None if it need not.

    Two different 16-bit dtypes under CUDA's autocast are refused: PEFT casts nothing there, and its sum is float32.
    """
    reason = lora.refusal(layer, args, kwargs)
    if reason is None and args and torch.is_autocast_enabled() and args[0].dtype in _HALVES:
        x, cast = args[0].dtype, torch.get_autocast_dtype("cuda")
        if x != cast:
            return f"input is {str(x).removeprefix('torch.')} under autocast to {str(cast).removeprefix('torch.')}"
    return reason


def gradient_gap(layer: Any) -> str:
    """Return why the base layer passes no gradient to its input, bound or not; "" if it passes one."""
    weight = layer._modules["base_layer"]._parameters.get("weight")
    if _is_packed(weight):
        return "bitsandbytes packed the weight at an evaluation on this CPU; the base passes no gradient to its input"
    if any(getattr(weight, name, None) is not None for name in _QUANTISES_INPUT):
        return "torchao quantises the activations; the base passes no gradient to its input"
    return ""


@cache
def _warn_once(gap: str) -> None:
    logger.warning("%s, so layers below get only a part of their gradient, as in stock PEFT: docs/quantised.md", gap)


class SafeQuantisedLinear(lora.SafeLoraLinear):
    """The fast path over a quantised base layer, whose own forward and backward do not change."""

    _refusal = staticmethod(refusal)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.training and not torch.compiler.is_compiling() and (gap := gradient_gap(self)):
            _warn_once(gap)
        return super().forward(x, *args, **kwargs)


@register_adapter
class QuantisedLora(lora.LoraAdapter):
    """One LoRA adapter of one layer over a quantised base."""

    layer_type = TorchaoLoraLinear
    layer_names = tuple(DEQUANTISE)
    mixin = SafeQuantisedLinear
    refusal = staticmethod(refusal)
    note = staticmethod(gradient_gap)

    def base_weight(self) -> Tensor | None:
        """Return None: the weight is stored only in quantised form."""
        return None

    def dequantise(self) -> Tensor | None:
        """Dequantise the base weight; None if the package cannot do this."""
        make = DEQUANTISE[dotted_name(original_type(self.layer))]
        return None if make is None else make(self.layer.get_base_layer())
