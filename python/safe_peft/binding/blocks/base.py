"""What binding needs to know of a part of a transformer block, and how a module is recognised: by what it computes.

Names of classes say little: every model family has its own. So a copy of a module, with small random weights in the
place of its own, is called once, and what it returns is compared with the formula.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..class_swap import Swapped, is_hooked, is_transformed, original_type
from ..code import Code, watched


class Part(ABC):
    """What binding keeps about one part, and why a call of it may not take the fast path."""

    mixin: ClassVar[type[Swapped]]
    """What binding puts on the module."""
    stem: ClassVar[str]
    """What `bind(parts=...)` calls it: "norms", "mlps", "attention" or "dropouts"."""
    op: str
    """The op that serves it, such as "safe_kernels::rms_norm"."""
    covers: tuple[str, ...] = ()
    """Names of the module's children whose work the op does as well."""
    codes: tuple[tuple[str, Code], ...] = ()
    """What was recognised: the module's own code under "", and that of the children that are not called."""

    @classmethod
    @abstractmethod
    def recognise(cls, module: nn.Module) -> Part | None:
        """Return what is to be kept about a module of this kind; None if it is no such module."""

    @property
    def passes_over(self) -> tuple[str, ...]:
        """Names of the children that the op does not call."""
        return self.covers

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the module's attributes that are read in every call, and so may change."""
        return ()

    def watch(self, module: nn.Module) -> Self:
        """Remember what a module was recognised by, so that `refusal` notices what changes of it.

        Args:
            module: as `recognise` has just seen it.
        """
        children = [(name, module._modules[name]) for name in self.passes_over]
        seen = [(name, child) for name, child in [("", module), *children] if child is not None]
        read = {name: _READ if is_dropout(child) else () if name else self.reads for name, child in seen}
        self.codes = tuple((name, Code(child, read[name])) for name, child in seen)
        return self

    def refusal(self, module: nn.Module) -> str | None:
        """Why the module's own code has to serve its calls, in a few words; None if the op can.

        It stands before every call, so it compares identities and asks for no attribute by nn.Module's lookup.
        """
        if "forward" in module.__dict__:
            return "forward is replaced on the module itself"
        children = module._modules
        for name, code in self.codes:
            part = children.get(name) if name else module
            change = code.change(part)
            if change is not None:
                return f"{name}: {change}" if name else change
            if name and is_hooked(part):  # type: ignore[arg-type]
                return f"hooks on {name}"
        if len(self.codes) > 1 and watched():
            return f"hooks on the calls of all modules, {' and '.join(self.passes_over)} among them"
        return None

    def note(self, module: nn.Module) -> str:
        """What a user may want to know about how the op serves it."""
        return ""


_READ = ("p", "inplace")
"""What is read of a dropout in every call."""
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor})


def is_plain(*values: Any) -> bool:
    """Whether all of them are floating-point tensors that an op takes, and nothing would change what it does."""
    return not is_transformed() and all(
        type(value) in _TENSORS
        and value.dtype in _FLOATS
        and value.layout is torch.strided
        and not value.is_nested
        and value.dim() > 0
        for value in values
    )


def stand_in(
    module: nn.Module,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    children: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """Return a shallow copy with other parameters and children, and without hooks: called, it touches nothing else."""
    clone = copy.copy(module)
    own = {name: nn.Parameter(value, requires_grad=False) for name, value in (parameters or {}).items()}
    clone.__dict__ |= {"_parameters": own, "_buffers": dict(module._buffers), "_modules": dict(children or {})}
    clone.__dict__ |= {name: OrderedDict() for name in _HOOKS}
    return clone


def agrees(run: Callable[[], Any], expected: Tensor) -> bool:
    """Whether a trial returns what a formula says, to the rounding of float32.

    Args:
        run: calls a stand-in; whatever it raises means no.
        expected: float32.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            result = run()
    except Exception:
        return False
    if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    return torch.allclose(result, expected, rtol=1e-5, atol=1e-6)


def sample(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float32, the same every time, without drawing from torch's own generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def small_linear(d_in: int, d_out: int, seed: int) -> nn.Linear:
    """A frozen layer with the same weights every time, without drawing from torch's own generator."""
    layer = nn.Linear(d_in, d_out, device="meta", dtype=torch.float32)
    layer.weight = nn.Parameter(sample(d_out, d_in, seed=seed), requires_grad=False)
    layer.bias = nn.Parameter(sample(d_out, seed=seed + 10), requires_grad=False)
    return layer


def is_dropout(module: nn.Module | None) -> bool:
    """nn.Dropout itself, bound or not: a subclass may compute something else."""
    return module is not None and original_type(module) is nn.Dropout


def is_linear(module: nn.Module | None) -> bool:
    """A linear layer, whatever PEFT or a quantiser has made of it; GPT-2's Conv1D calls its features nx and nf."""
    return all(hasattr(module, name) for name in ("in_features", "out_features")) or hasattr(module, "nf")
