"""A node of the graph that only keeps tensors, and the identity of a tensor's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Keep(torch.autograd.Function):
    """A node that saves tensors, so that hooks around it see them and in-place writes to them are detected."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on this node")


def keep(tensors: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that returns these tensors, and raises PyTorch's error if one was written to in place."""
    with torch.enable_grad():
        output = _Keep.apply(torch.empty(0, requires_grad=True), *tensors)
    return lambda: output.grad_fn.saved_tensors  # torch 2.11 drops them when the node's output is gone


def storage_of(tensor: Tensor) -> int | None:
    """Return the identity of a tensor's memory; None for a tensor without a storage, such as a sparse one."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None
