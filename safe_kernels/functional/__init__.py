"""The public ops, one file per op: documentation, checks, and the call of PyTorch's dispatcher."""

from __future__ import annotations

from safe_kernels.functional.activation import activation
from safe_kernels.functional.bottleneck import bottleneck
from safe_kernels.functional.dora import dora
from safe_kernels.functional.dropout import dropout
from safe_kernels.functional.gated_activation import gated_activation
from safe_kernels.functional.layer_norm import layer_norm
from safe_kernels.functional.linear_cross_entropy import linear_cross_entropy
from safe_kernels.functional.lora import lora
from safe_kernels.functional.lora_conv import lora_conv
from safe_kernels.functional.lora_linear import lora_linear
from safe_kernels.functional.random import draw_rng_state
from safe_kernels.functional.rms_norm import rms_norm
from safe_kernels.functional.rotary import rotary

__all__ = [
    "activation",
    "bottleneck",
    "dora",
    "draw_rng_state",
    "dropout",
    "gated_activation",
    "layer_norm",
    "linear_cross_entropy",
    "lora",
    "lora_conv",
    "lora_linear",
    "rms_norm",
    "rotary",
]
