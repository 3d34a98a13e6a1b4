"""RMSNorm and LayerNorm that retain their output, which their readers retain anyway, instead of their input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import safe_kernels
from safe_kernels import reference
from safe_kernels.inversion import invertible

from ..swap import STATE, Swapped, is_bound, original_type, own_forward
from .base import Part, agrees, is_plain, sample, stand_in

INVERTS = "_safe_inverts"
"""What a copy without values carries of its original's: whether x can be told from the output."""

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
_OFFSETS = (0.0, 1.0)  # Gemma's weight counts from 1


class SafeNorm(Swapped):
    """A norm computed by `safe_kernels.rms_norm` or `safe_kernels.layer_norm`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own formula."""
        if not is_bound(self):
            return own_forward(self, x, *args, **kwargs)
        part: Norm = self.__dict__[STATE]
        weight: Any = self._parameters["weight"]  # of a LayerNorm it may be None
        if args or kwargs or not part.takes(self, x):
            return super().forward(x, *args, **kwargs)
        keep = part.retains_output(self)
        eps = getattr(self, part.eps)
        if part.formula == "rms_norm":
            return safe_kernels.rms_norm(x, weight, eps, weight_offset=part.offset, retain_output=keep)
        if x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # as autocast does for layer_norm
        return safe_kernels.layer_norm(x, weight, self._parameters.get("bias"), eps, retain_output=keep)


@dataclass
class Norm(Part):
    """A norm over the last dimension.

    Args:
        formula: "rms_norm" or "layer_norm".
        eps: name of the module's attribute that holds it.
        offset: what is added to the weight.
    """

    mixin = SafeNorm
    stem = "norms"
    formula: str
    eps: str
    offset: float = 0.0
    _seen: tuple[Any, ...] | None = field(default=None, repr=False)
    _inverts: bool = field(default=True, repr=False)

    @property
    def op(self) -> str:  # type: ignore[override]
        """The op that serves it."""
        return f"safe_kernels::{self.formula}"

    @classmethod
    def recognise(cls, module: nn.Module) -> Norm | None:
        """A LayerNorm of torch's own over one dimension, or whatever computes one of the two formulas."""
        if isinstance(module, nn.LayerNorm) and original_type(module) is nn.LayerNorm:
            return cls("layer_norm", "eps") if len(module.normalized_shape) == 1 else None
        weight = module._parameters.get("weight")
        eps = next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
        if eps is None or weight is None or weight.dim() != 1 or module._modules or module._buffers:
            return None
        if not set(module._parameters) <= {"weight", "bias"}:
            return None
        return next((norm for norm in cls._candidates(eps) if norm._computes(module)), None)

    @classmethod
    def _candidates(cls, eps: str) -> list[Norm]:
        return [*(cls("rms_norm", eps, offset) for offset in _OFFSETS), cls("layer_norm", eps)]

    def _computes(self, module: nn.Module) -> bool:
        """Whether this formula is what the module computes, for other weights and another eps than its own."""
        x, weight, bias = sample(5, 12), sample(12, seed=1), sample(12, seed=2)
        has_bias = module._parameters.get("bias") is not None
        clone = stand_in(module, parameters={"weight": weight, **({"bias": bias} if has_bias else {})})
        if not has_bias and "bias" in module._parameters:
            clone._parameters["bias"] = None
        clone.__dict__[self.eps] = 0.25
        if self.formula == "rms_norm":
            expected = reference.rms_norm(x, weight, 0.25, self.offset)[0]
            return not has_bias and agrees(lambda: original_type(module).forward(clone, x), expected)
        expected = reference.layer_norm(x, weight, bias if has_bias else None, 0.25)[0]
        return agrees(lambda: original_type(module).forward(clone, x), expected)

    def takes(self, module: nn.Module, x: Any) -> bool:
        """Whether the op serves a call: dtypes that differ follow rules that every family makes for itself."""
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        shown = [p for p in (weight, bias) if p is not None]
        if not is_plain(x, *shown) or not isinstance(getattr(module, self.eps), float):
            return False
        if weight is None or x.dtype == weight.dtype:
            return True
        return self.formula == "layer_norm" and torch.is_autocast_enabled(x.device.type)

    def retains_output(self, module: nn.Module) -> bool:
        """Whether x can be told from the output: looked at once, and again whenever the weights have changed."""
        if torch.compiler.is_compiling():
            return self._inverts
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        seen = tuple((id(p), p._version) for p in (weight, bias) if p is not None)
        if seen != self._seen:
            self._inverts, self._seen = self._look(module, weight, bias), seen
        return self._inverts

    def _look(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> bool:
        shown = [p for p in (weight, bias) if p is not None]
        if any(isinstance(p, FakeTensor) or p.is_meta for p in shown):
            return bool(module.__dict__.get(INVERTS, True))  # no values to look at, in a plan
        return invertible(weight, bias, self.offset)

    def note(self, module: nn.Module) -> str:
        """Why the input is retained, where it is."""
        trains = [name for name, p in module._parameters.items() if p is not None and p.requires_grad]
        if trains:
            return f"retains its input: {' and '.join(trains)} trains"
        if not self.retains_output(module):
            return "retains its input: a weight is zero, or too small beside its bias to be divided by"
        return ""
