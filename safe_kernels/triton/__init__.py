"""Triton kernels for GPUs: `_xxx_kernel` runs on the GPU, and the host function has the op's signature.

They are registered on PyTorch's CUDA key, which AMD GPUs use too. Without Triton nothing is registered, and the
reference runs on GPUs, as on every device without a kernel.

The first call that needs Triton imports it. Therefore `import safe_kernels` is cheap on a machine without a GPU, and a
broken Triton cannot make it fail.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from safe_kernels import _C
from safe_kernels.triton.runtime import launch_replay

STEMS: dict[str, tuple[str, ...]] = {
    "activation": ("activation", "activation_backward"),
    "bottleneck": ("bottleneck", "bottleneck_backward"),
    "dora": ("dora", "dora_backward"),
    "dropout": ("dropout",),
    "gated_activation": ("gated_activation", "gated_activation_backward"),
    "layer_norm": ("layer_norm", "layer_norm_backward"),
    "lora": ("lora", "lora_backward"),
    "lora_linear": ("lora_linear", "lora_linear_backward"),
    "rms_norm": ("rms_norm", "rms_norm_backward"),
    "rotary": ("rotary",),
}
"""The ops of each file with host functions."""


@functools.cache
def host_function(op: str) -> Callable[..., Any]:
    """The function that launches an op's kernels; it has the op's arguments and results. This imports Triton."""
    for stem, ops in STEMS.items():
        if op in ops:
            return getattr(importlib.import_module(f"{__name__}.{stem}"), op)
    raise KeyError(op)


def register() -> None:
    """Registers every op on the CUDA key, for the life of the process. Without Triton nothing is registered."""
    if importlib.util.find_spec("triton") is not None:
        for ops in STEMS.values():
            for op in ops:
                register_replayed(op, "CUDA")


def register_replayed(op: str, key: str) -> None:
    """Registers an op's host function under a dispatch key; C++ replays its launch records."""

    def host(*args: Any) -> Any:
        return host_function(op)(*args)

    _C.register_replayed(op, host, launch_replay.recorded(host), key)
