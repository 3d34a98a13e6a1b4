"""Activations of plain MLPs: they retain the pre-activation, and the next layer recomputes its input from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import safe_kernels
from safe_kernels import reference

from ..class_swap import STATE, SwappedModule, is_bound, original_type, own_forward
from .base import Part, agrees, is_plain, stand_in

KINDS = ("silu", "gelu", "gelu_tanh", "relu")


def activation_kind(module: nn.Module | None) -> str | None:
    """Return which kind of `safe_kernels.activation` a module computes, by a trial call; None if it is none of them.

    Args:
        module: called only if it has no parameters, no buffers and no children.

    Example:
        >>> activation_kind(nn.GELU(approximate="tanh")), activation_kind(nn.Tanh())
        ('gelu_tanh', None)
    """
    if module is None or any((module._parameters, module._buffers, module._modules)):
        return None
    if isinstance(module, nn.Dropout | nn.Identity) or getattr(module, "inplace", False):
        return None
    far = [-300.0, -30.0, -9.0, 9.0, 12.0, 30.0, 300.0]
    x = torch.cat([torch.linspace(-6.0, 6.0, 97), torch.tensor(far)]).float()
    clone = stand_in(module)

    def run() -> Any:
        return original_type(module).forward(clone, x)

    return next((kind for kind in KINDS if agrees(run, reference.activation(x, kind))), None)


class SafeActivation(SwappedModule):
    """An activation computed by `safe_kernels.activation`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the module's own formula."""
        if not is_bound(self):
            return own_forward(self, x, *args, **kwargs)
        part: Activation = self.__dict__[STATE]
        if args or kwargs or not is_plain(x) or part.refusal(self) is not None:
            return super().forward(x, *args, **kwargs)
        return safe_kernels.activation(x, part.kind)


@dataclass
class Activation(Part):
    """An activation.

    Args:
        kind: the name in `safe_kernels.activation`.
    """

    mixin = SafeActivation
    stem = "mlps"
    kind: str
    op: str = "safe_kernels::activation"

    @classmethod
    def recognise(cls, module: nn.Module) -> Activation | None:
        """Recognise a module without parameters, buffers and children that computes one of the kinds."""
        kind = activation_kind(module)
        return None if kind is None else cls(kind)
