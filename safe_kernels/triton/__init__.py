"""Triton kernels for GPUs: `_xxx_kernel` runs on the GPU, and the host function has the op's signature.

They are registered on PyTorch's CUDA key, which AMD GPUs use too. Without Triton nothing is registered, and the
reference runs on GPUs, as on every device without a kernel.

The first call that needs Triton imports it. Therefore `import safe_kernels` is cheap on a machine without a GPU, and a
broken Triton cannot make it fail.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from safe_kernels import _C
from safe_kernels.triton.runtime import launch_replay

STEMS: dict[str, tuple[str, ...]] = {
    "activation": ("activation", "activation_backward"),
    "dropout": ("dropout",),
    "gated_activation": ("gated_activation", "gated_activation_backward"),
    "layer_norm": ("layer_norm", "layer_norm_backward"),
    "lora": ("lora", "lora_backward"),
    "lora_linear": ("lora_linear", "lora_linear_backward"),
    "rms_norm": ("rms_norm", "rms_norm_backward"),
}
"""The ops of each file with host functions."""


def installed() -> bool:
    """Whether Triton is installed.

    Returns:
        True if Python finds the package. It is not imported.

    Example:
        >>> isinstance(installed(), bool)
        True
    """
    return importlib.util.find_spec("triton") is not None


def host_function(op: str) -> Callable[..., Any]:
    """The function that launches an op's kernels. This imports Triton.

    Args:
        op: the op's name, such as `lora`.

    Returns:
        A function with the arguments and results of the op's schema.

    Raises:
        KeyError: the op has no Triton kernel.

    Example:
        >>> host_function("lora").__module__  # doctest: +SKIP
        'safe_kernels.triton.lora'
    """
    for stem, ops in STEMS.items():
        if op in ops:
            return getattr(importlib.import_module(f"{__name__}.{stem}"), op)
    raise KeyError(op)


def register() -> bool:
    """Registers every op on the CUDA key, for the life of the process.

    Returns:
        Whether Triton is installed. If not, nothing is registered.

    Example:
        >>> register() or "there is no Triton"  # doctest: +SKIP
    """
    if not installed():
        return False
    for ops in STEMS.values():
        for op in ops:
            register_replayed(op, "CUDA")
    return True


def register_replayed(op: str, key: str) -> None:
    """Registers an op's host function; C++ replays its launch records.

    Args:
        op: the op's name.
        key: a dispatch key.

    Example:
        >>> register_replayed("lora", "CUDA")  # doctest: +SKIP
    """
    host = _deferred(op)
    _C.register_replayed(op, host, launch_replay.recorded(host), key)


def _deferred(op: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def kernel(*args: Any) -> Any:
        if not found:
            found.append(host_function(op))
        return found[0](*args)

    return kernel
