"""The formulas in plain PyTorch, one file per op.

Each function has three uses: tests compare kernels with it, devices without their own kernel run it, and
`torch.compile` traces with it as the fake kernel. `safe_kernels` registers the functions under
``CompositeExplicitAutograd``, which covers meta tensors too.
"""

from __future__ import annotations

from safe_kernels.reference.activation import activation, activation_backward
from safe_kernels.reference.bottleneck import bottleneck, bottleneck_backward
from safe_kernels.reference.dora import dora, dora_backward
from safe_kernels.reference.dropout import dropout
from safe_kernels.reference.gated_activation import gated_activation, gated_activation_backward
from safe_kernels.reference.importance import cka_sums, one_minus_cka
from safe_kernels.reference.layer_norm import layer_norm, layer_norm_backward
from safe_kernels.reference.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_backward
from safe_kernels.reference.lora import lora, lora_backward
from safe_kernels.reference.lora_conv import lora_conv, lora_conv_backward
from safe_kernels.reference.lora_linear import lora_linear, lora_linear_backward
from safe_kernels.reference.philox import MASK_VERSION, dropout_keep, dropout_scale, dropout_threshold, philox
from safe_kernels.reference.rms_norm import rms_norm, rms_norm_backward
from safe_kernels.reference.rotary import rotary

OPS = (
    activation,
    activation_backward,
    bottleneck,
    bottleneck_backward,
    dora,
    dora_backward,
    dropout,
    gated_activation,
    gated_activation_backward,
    layer_norm,
    layer_norm_backward,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    lora,
    lora_backward,
    lora_conv,
    lora_conv_backward,
    lora_linear,
    lora_linear_backward,
    rms_norm,
    rms_norm_backward,
    rotary,
)
"""The functions that are registered as ops, under their own names."""

__all__ = [
    "MASK_VERSION",
    "OPS",
    "activation",
    "activation_backward",
    "bottleneck",
    "bottleneck_backward",
    "cka_sums",
    "dora",
    "dora_backward",
    "dropout",
    "dropout_keep",
    "dropout_scale",
    "dropout_threshold",
    "gated_activation",
    "gated_activation_backward",
    "layer_norm",
    "layer_norm_backward",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "lora",
    "lora_backward",
    "lora_conv",
    "lora_conv_backward",
    "lora_linear",
    "lora_linear_backward",
    "one_minus_cka",
    "philox",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
]
