"""Plans for a kind of device that may not be there: a training on a GPU, planned on a machine without one."""

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
    """Return the kind of device that a plan is for, "" for wherever the model is.

    Args:
        device: such as "cuda" or "cpu"; its index does not matter.

    Raises:
        PlanError: It is none of these.

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
    """Return what makes fake tensors on one device retain what those of another kind would.

    Args:
        kind: where the model will train; "" for here.
        here: where its fake copy lies.
    """
    return AsOnGpu() if kind == "cuda" and here.type == "cpu" else nullcontext()


class AsOnGpu(TorchFunctionMode):
    """PyTorch's ops keep for backward what their kernels need, and some of CUDA's need other things than the CPU's.

    - `dropout`: one kernel, and a mask of one byte per element; on the CPU the mask is of the input's dtype.
    - `scaled_dot_product_attention` with a dropout: two seeds; on the CPU all probabilities and a mask of them.

    Example:
        >>> with AsOnGpu():
        ...     F.dropout(torch.ones(2, requires_grad=True), 0.5).grad_fn.name()
        'NativeDropoutBackward0'
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, or what stands for it on a GPU."""
        stand_in = _ON_GPU.get(func, func)
        return stand_in(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace or not training or not 0.0 < p < 1.0:
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **others: Any
) -> Tensor:
    """There are no values to drop, so the dropout only has to draw: the random state shows that the block is random."""
    if dropout_p:
        torch.rand(1, device=query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, **others)


_ON_GPU = {F.dropout: _dropout, F.scaled_dot_product_attention: _attention}
