"""Adapter kernels that retain only what backward needs, and can score the adapter in the same call.

This package works only with tensors. `safe_peft` binds it into Hugging Face PEFT models.
"""

from __future__ import annotations

import torch

try:
    from safe_kernels import _C as _C  # this import registers the ops
except ImportError as error:
    raise ImportError(
        f"safe_kernels._C cannot be loaded with torch {torch.__version__} ({error}); "
        "build it for this torch with: pip install --no-build-isolation -e ."
    ) from error

from safe_kernels import flops as flops
from safe_kernels import reference, retention
from safe_kernels import triton as _triton
from safe_kernels.functional import (
    activation,
    bottleneck,
    dora,
    dropout,
    gated_activation,
    layer_norm,
    linear_cross_entropy,
    lora,
    lora_conv,
    lora_linear,
    rms_norm,
    rotary,
)
from safe_kernels.inversion import invertible
from safe_kernels.statistics import AdapterStatistics, RowBlocks
from safe_kernels.triton.runtime.tuning import autotune

# The library object must live as long as its registrations.
_REFERENCE = torch.library.Library("safe_kernels", "IMPL")
for _op in reference.OPS:
    _REFERENCE.impl(_op.__name__, _op, "CompositeExplicitAutograd")
_triton.register()

__all__ = [
    "AdapterStatistics",
    "RowBlocks",
    "activation",
    "autotune",
    "bottleneck",
    "dora",
    "dropout",
    "gated_activation",
    "invertible",
    "layer_norm",
    "linear_cross_entropy",
    "lora",
    "lora_conv",
    "lora_linear",
    "reference",
    "retention",
    "rms_norm",
    "rotary",
]
