"""RMSNorm and LayerNorm that retain their output instead of their input, if a reader retains this output anyway."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

import safe_kernels
from safe_kernels import reference
from safe_kernels.inversion import invertible, marks

from ..class_swap import autocasts, original_type
from .base import Part, agrees, is_plain, sample, stand_in

INVERTS = "_safe_inverts"
"""Attribute of a copy without values: whether the input can be computed from the output in the original."""
MOST_READS = 8
"""How often a norm's weights are read if reading waits for the device."""
_EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
_OFFSETS = (0.0, 1.0)  # Gemma's weight counts from 1
_SHAPED = (nn.LayerNorm, nn.RMSNorm)
_TRIAL_EPS = 0.25
_16_BIT = frozenset({torch.bfloat16, torch.float16})
_OTHERWISE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.GroupNorm, "normalises groups of channels; the ops normalise the last dimension"),
    (nn.modules.batchnorm._BatchNorm, "normalises over the batch; the ops normalise the last dimension"),
    (nn.modules.instancenorm._InstanceNorm, "normalises channels of an image; the ops normalise the last dimension"),
    (nn.LocalResponseNorm, "normalises over neighbouring channels; the ops normalise the last dimension"),
)


@dataclass
class Norm(Part):
    """A norm over the last dimension.

    Args:
        formula: "rms_norm" or "layer_norm".
        eps: name of the module's attribute with the number that is added to the variance.
        offset: added to the weight.
        names: names of the parameters.
        keeps_dtype: whether the result of a 16-bit input has 16 bits.
    """

    stem = "norms"
    formula: str
    eps: str
    offset: float = 0.0
    names: tuple[str, ...] = field(default=(), repr=False)
    keeps_dtype: bool = field(default=True, repr=False)
    _marks: tuple[Any, ...] = field(default=(), repr=False)
    _inverts: bool = field(default=True, repr=False)
    _reads: int = field(default=0, repr=False)
    _ones: Tensor | None = field(default=None, repr=False)

    @property
    def op(self) -> str:  # type: ignore[override]
        return f"safe_kernels::{self.formula}"

    @classmethod
    def recognise(cls, module: nn.Module) -> Norm | None:
        """Recognise a module that computes one of the two formulas over its last dimension."""
        eps, width = _eps_name(module), _width(module)
        if eps is None or width is None or _holds_more(module):
            return None
        layer, rms = [cls("layer_norm", eps)], [cls("rms_norm", eps, offset) for offset in _OFFSETS]
        candidates = [*layer, *rms] if isinstance(module, nn.LayerNorm) else [*rms, *layer]
        found = next((norm for norm in candidates if norm._computes(module, width)), None)
        if found is not None:
            found.names = tuple(module._parameters)
            clone, x = found._trial(module, width, torch.bfloat16), sample(2, width).bfloat16()
            forward = original_type(module).forward
            found.keeps_dtype = agrees(lambda: forward(clone, x).mul(0), torch.zeros_like(x))
        return found

    def _trial(self, module: nn.Module, width: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a copy of the module with other weights and another eps."""
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        clone = stand_in(module, parameters={name: sample(width, seed=1 + len(name)).to(dtype) for name in own})
        clone._parameters.update((name, None) for name in module._parameters.keys() - own)
        clone.__dict__[self.eps] = _TRIAL_EPS
        return clone

    def _computes(self, module: nn.Module, width: int) -> bool:
        """Whether the module computes this formula over the last dimension, for inputs of two and three dimensions."""
        clone = self._trial(module, width)
        weight, bias = clone._parameters.get("weight"), clone._parameters.get("bias")
        for shape in ((5, width), (2, 3 if width != 3 else 4, width)):
            x = sample(*shape)
            if self.formula == "layer_norm":
                expected = reference.layer_norm(x, weight, bias, _TRIAL_EPS)[0]
            elif bias is None:
                gain = torch.ones(width) if weight is None else weight
                expected = reference.rms_norm(x, gain, _TRIAL_EPS, self.offset)[0]
            else:
                return False
            if not agrees(partial(original_type(module).forward, clone, x), expected):
                return False
        return True

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.eps,)

    def refusal(self, module: nn.Module) -> str | None:
        if tuple(module._parameters) != self.names:
            return "its parameters were replaced (prune, parametrize)"
        return super().refusal(module)

    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Tensor | None:
        if not self.takes(module, *args, **kwargs):
            return None
        x, eps = args[0], getattr(module, self.eps)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        weight, keep = module._parameters.get("weight"), self.retains_output(module)
        if self.formula == "rms_norm":
            weight = self._ones_for(x) if weight is None else weight
            return safe_kernels.rms_norm(x, weight, eps, weight_offset=self.offset, retain_output=keep)
        if x.dtype in _16_BIT and autocasts(x) and x.device.type != "cpu":
            x = x.float()  # as autocast does for layer_norm, except on a CPU
        return safe_kernels.layer_norm(x, weight, module._parameters.get("bias"), eps, retain_output=keep)

    def takes(self, module: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Whether the op can compute a call: for different dtypes, every model family has its own rules."""
        shown = _shown(module)
        if not super().takes(module, *args, **kwargs) or not is_plain(*shown):
            return False
        x, eps = args[0], getattr(module, self.eps)
        if not isinstance(eps, float) and (eps is not None or not isinstance(module, nn.RMSNorm)):
            return False
        if x.dtype in _16_BIT and not self.keeps_dtype:
            return False
        is_one_dtype = all(x.dtype == p.dtype for p in shown)
        if isinstance(module, _SHAPED) and original_type(module) is not nn.LayerNorm:
            return is_one_dtype and (x.dtype not in _16_BIT or not autocasts(x))
        return is_one_dtype or (self.formula == "layer_norm" and autocasts(x))

    def _ones_for(self, x: Tensor) -> Tensor:
        """Return ones, the weight of a norm without a weight. Like a parameter, it is created once, not per call."""
        if torch.compiler.is_compiling():
            return x.new_ones(x.shape[-1])
        own = self._ones
        if own is None or (own.shape[0], own.dtype, own.device) != (x.shape[-1], x.dtype, x.device):
            own = self._ones = nn.Parameter(x.new_ones(x.shape[-1]), requires_grad=False)
        return own

    def retains_output(self, module: nn.Module) -> bool:
        """Whether the output may be retained instead of the input: the current weights allow its inversion.

        A compiler would treat the answer as a constant. A hook may keep an alias of the output and write to it later.
        """
        if torch.compiler.is_compiling() or module._forward_hooks:
            return False
        shown = _shown(module)
        if any(p.requires_grad for p in shown):
            return False
        if any(isinstance(p, FakeTensor) or p.is_meta for p in shown):
            return bool(module.__dict__.get(INVERTS, True))  # in a plan there are no values
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if not any(reading_waits(p) for p in shown):
            return invertible(weight, bias, self.offset)
        now = tuple(map(marks, shown))  # the same answer without reading the values in every call
        if None in now:
            return False  # other tensors share this memory, and a write through them is not detected
        if now != self._marks:
            if self._reads == MOST_READS:
                return False
            self._reads += 1
            self._inverts = invertible(weight, bias, self.offset)
            self._marks = tuple(map(marks, shown))  # reading has created aliases
        return self._inverts

    def note(self, module: nn.Module) -> str:
        """Return why the input is retained; "" if the output can be."""
        if trains := [name for name, p in module._parameters.items() if p is not None and p.requires_grad]:
            return f"retains its input: {' and '.join(trains)} trains"
        if module._forward_hooks:
            return "retains its input: a forward hook on it may write to its output"
        if self.retains_output(module):
            return ""
        if self._reads == MOST_READS:
            return f"retains its input: its weights were written to more than {MOST_READS} times"
        if any(reading_waits(p) and not p.is_meta and marks(p) is None for p in _shown(module)):
            return "retains its input: other tensors share the memory of its weights, and may write to it"
        return "retains its input: a weight is zero, or too small compared with its bias"


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading a tensor's values waits until its device has finished all its work."""
    return tensor.device.type != "cpu"


def _shown(module: nn.Module) -> list[Tensor]:
    return [p for p in module._parameters.values() if p is not None]


def reason(module: nn.Module) -> str:
    """Return why `Norm.recognise` returns None for a module that is named a norm, in a few words."""
    for kind, words in _OTHERWISE:
        if isinstance(module, kind):
            return words
    if isinstance(module, _SHAPED) and len(module.normalized_shape) != 1:
        return f"normalises over {len(module.normalized_shape)} dimensions; the ops normalise the last one"
    if _holds_more(module):
        return "has modules, buffers or parameters other than a weight and a bias"
    if _width(module) is None:
        return "has no weight of one dimension"
    if _eps_name(module) is None:
        return f"has no number with the name {', '.join(_EPS_NAMES[:-1])} or {_EPS_NAMES[-1]}"
    return "computes neither rms_norm nor layer_norm over the last dimension"


def _eps_name(module: nn.Module) -> str | None:
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        return "eps"  # torch uses the eps of x's dtype
    return next((name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)), None)


def _width(module: nn.Module) -> int | None:
    """Return the size of the normalised dimension; None if the module does not show it."""
    if isinstance(module, _SHAPED) and len(module.normalized_shape) != 1:
        return None
    weight = module._parameters.get("weight")
    if weight is not None:
        return weight.numel() if weight.dim() == 1 else None
    return int(module.normalized_shape[0]) if isinstance(module, _SHAPED) else None


def _holds_more(module: nn.Module) -> bool:
    return bool(module._modules or module._buffers or not set(module._parameters) <= {"weight", "bias"})
