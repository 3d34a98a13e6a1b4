"""Plans for another kind of device: training on a GPU, planned on a machine without a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import PlanError

KINDS = ("cpu", "cuda")


def device_kind(device: str | torch.device | None) -> str:
    """Return the kind of device that a plan is for; "" for the model's own device.

    Args:
        device: such as "cuda" or "cpu"; its index is ignored.

    Raises:
        PlanError: The device is not a CPU or a CUDA device.

    Example:
        >>> device_kind(torch.device("cuda", 1))
        'cuda'
    """
    if device is None:
        return ""
    kind = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if kind not in KINDS:
        raise PlanError(f"device: expected {' or '.join(KINDS)}, where the model will train, got {device!r}.")
    return kind


def as_on(kind: str, here: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which fake tensors on one device retain the same bytes as tensors on another kind of device.

    Args:
        kind: the kind of device for the training; "" for the current device.
        here: the device of the model's fake copy.
    """
    return AsOnGpu() if kind == "cuda" and here.type == "cpu" else nullcontext()


class AsOnGpu(TorchFunctionMode):
    """Makes PyTorch's ops on a CPU retain what the CUDA kernels retain.

    - `dropout` retains a mask of one byte per element on a GPU, and a mask of the input's dtype on a CPU.
    - `scaled_dot_product_attention` with dropout retains two seeds on a GPU, and on a CPU all probabilities and a mask.

    Example:
        >>> with AsOnGpu():
        ...     F.dropout(torch.ones(2, requires_grad=True), 0.5).grad_fn.name()
        'NativeDropoutBackward0'
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or its replacement for a GPU."""
        stand_in = _ON_GPU.get(func, func)
        return stand_in(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace or not training or not 0.0 < p < 1.0:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **others: Any
) -> Tensor:
    """Compute attention without dropout, and draw one number, so that the block counts as random."""
    if dropout_p:
        torch.rand(1, device=query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **others)


_ON_GPU = {F.dropout: _dropout, F.scaled_dot_product_attention: _attention}
