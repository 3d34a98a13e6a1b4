"""The interface of a part of a transformer block, and helpers that recognise a module by what it computes.

Every model family has its own class names. So a copy of a module with small random weights is called once, and its
result is compared with the formula.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..adapters.base import FLOATS, TENSORS
from ..class_swap import STATE, SwappedModule, is_hooked, is_transformed, original_type, own_forward
from ..code import Code, watched


class SafePart(SwappedModule):
    """A module whose calls its `Part` computes, if it can."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part: Part | None = self.__dict__.get(STATE)
        if part is None:
            return own_forward(self, *args, **kwargs)
        result = part.compute(self, *args, **kwargs)
        return super().forward(*args, **kwargs) if result is None else result


class Part(ABC):
    """The state of one bound part, and the check whether a call can take the fast path."""

    stem: ClassVar[str]
    """The part's name in `bind(parts=...)`: "norms", "mlps", "attention" or "dropouts"."""
    op: str
    """The op that computes the part, such as "safe_kernels::rms_norm"."""
    covers: tuple[str, ...] = ()
    """Names of the module's children that the op computes too."""
    reads: tuple[str, ...] = ()
    """Names of the module's attributes that every call reads, and that may therefore change."""
    codes: tuple[tuple[str, Code], ...] = ()
    """The recognised code: the module's own under "", and the code of the children that are not called."""

    @classmethod
    @abstractmethod
    def recognise(cls, module: nn.Module) -> Part | None:
        """Return the part for a module of this kind; None for any other module."""

    @abstractmethod
    def compute(self, module: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Compute a call with the op; None if the module's own code must compute it."""

    def takes(self, module: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Whether a call passes one tensor that ops support, and the module is as it was recognised."""
        return len(args) == 1 and not kwargs and is_plain(args[0]) and self.refusal(module) is None

    @property
    def passes_over(self) -> tuple[str, ...]:
        """Names of the children that the op does not call."""
        return self.covers

    def watch(self, module: nn.Module) -> Self:
        """Store the code by which a module was just recognised, so that `refusal` detects changes."""
        children = [(name, module._modules[name]) for name in self.passes_over]
        seen = [(name, child) for name, child in [("", module), *children] if child is not None]
        read = {name: _READ if is_dropout(child) else () if name else self.reads for name, child in seen}
        self.codes = tuple((name, Code(child, read[name])) for name, child in seen)
        return self

    def refusal(self, module: nn.Module) -> str | None:
        """Return why the module's own code must compute its calls, in a few words; None if the op can.

        Every call makes this check, so it compares identities and avoids nn.Module's attribute lookup.
        """
        if "forward" in module.__dict__:
            return "forward is replaced on the module itself"
        for name, code in self.codes:
            part = module._modules.get(name) if name else module
            if (change := code.change(part)) is not None:
                return f"{name}: {change}" if name else change
            if name and is_hooked(part):  # type: ignore[arg-type]
                return f"hooks on {name}"
        if len(self.codes) > 1 and watched():
            return f"hooks on the calls of all modules, {' and '.join(self.passes_over)} among them"
        return None

    def note(self, module: nn.Module) -> str:
        """Return a remark for the user about how the op computes the part."""
        return ""


_READ = ("p", "inplace")
"""Attributes of a dropout that every call reads."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(*values: Any) -> bool:
    """Whether all values are tensors that an op supports, outside of torch.func and torch.jit.trace."""
    return not is_transformed() and all(
        type(value) in TENSORS
        and value.dtype in FLOATS
        and value.layout is torch.strided
        and not value.is_nested
        and value.dim() > 0
        for value in values
    )


def stand_in(
    module: nn.Module, *, parameters: Mapping[str, Tensor] = {}, children: Mapping[str, nn.Module] = {}
) -> nn.Module:
    """Return a shallow copy with other parameters and children and without hooks; a call of it changes nothing else."""
    clone = copy.copy(module)
    own = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    clone.__dict__ |= {"_parameters": own, "_buffers": dict(module._buffers), "_modules": dict(children)}
    clone.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    return clone


def agrees(run: Callable[[], Any], expected: Tensor) -> bool:
    """Whether a trial call returns a formula's result, to the rounding of float32; not if it raises."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = run()
    except Exception:
        return False
    if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    return torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


def sample(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal float32 numbers, the same at every call, without drawing from torch's own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def small_linear(d_in: int, d_out: int, seed: int) -> nn.Linear:
    """Return a frozen layer with the same weights at every call, without drawing from torch's own generator."""
    layer = nn.Linear(d_in, d_out, device="meta", dtype=torch.float32)
    layer.weight = nn.Parameter(sample(d_out, d_in, seed=seed), requires_grad=False)
    layer.bias = nn.Parameter(sample(d_out, seed=seed + 10), requires_grad=False)
    return layer


def is_dropout(module: nn.Module | None) -> bool:
    """Whether a module is nn.Dropout itself, bound or not; a subclass may compute something else."""
    return module is not None and original_type(module) is nn.Dropout


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer, also of PEFT or of a quantiser; GPT-2's Conv1D names its sizes nx and nf."""
    return all(hasattr(module, name) for name in ("in_features", "out_features")) or hasattr(module, "nf")
