"""The interface of an adapter, and the registry of the supported PEFT layer types."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from safe_kernels import AdapterStatistics

from ..class_swap import STATE, SwappedModule, original_type
from .score_inputs import ScoreInputs

PARAMETERS = frozenset({nn.Parameter, FakeTensor})
"""Types of parameters that the ops take; those of a model without values are fake tensors."""
TENSORS = PARAMETERS | {Tensor}
"""Types of tensors that the ops take."""
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The dtypes of the ops."""


@dataclass(slots=True, eq=False)
class LayerState:
    """The state of one bound layer, in plain Python, so that it is in no state dict and in no optimizer."""

    frozen: set[str] = field(default_factory=set)
    """Keys of the adapters that are frozen according to the ledger, independent of their requires_grad."""
    observe: dict[str, Callable[[Tensor], AdapterStatistics | None]] = field(default_factory=dict)
    """By key, returns the statistics that the next forward adds to; empty except in a scoring step."""
    owner: weakref.ref[Any] | None = None
    """The binding of the freezer that decides about this layer."""
    fused: bool = False
    """Whether the last call computed the base layer and its adapter in one op."""
    undo: dict[str, Adapter] = field(default_factory=dict)
    """By key, the adapter that a freezer froze, with its state before."""


def adapter_keys(layer: nn.Module) -> list[str]:
    """Return the names of the adapters in a layer of PEFT or of another library; [] for any other module."""
    return (adapter_of(layer) or Adapter).keys(layer)


def active_keys(layer: Any, present: Container[str]) -> list[str]:
    """Return which of a PEFT layer's present adapters are active. In a forward, `present` can be the dict of them."""
    active = layer._active_adapter
    if type(active) is str:
        return [active] if active in present else []
    return [key for key in active if key in present]


def adapter_parameters(layer: nn.Module, key: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter of a layer."""
    return (adapter_of(layer) or Adapter).parameters_of(layer, key)


@contextmanager
def unscored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the forwards of these layers out of every score inside the `with` block."""
    states = [state for module in modules if isinstance(state := module.__dict__.get(STATE), LayerState)]
    observed = [state.observe for state in states]
    for state in states:
        state.observe = {}
    try:
        yield
    finally:
        for state, observe in zip(states, observed, strict=True):
            state.observe = observe


class Adapter(ABC):
    """One adapter of one bound layer.

    Args:
        name: the layer's path in the model.
        layer: PEFT's layer.
        key: PEFT's name of the adapter in that layer, usually "default".
    """

    layer_type: ClassVar[type[nn.Module] | None] = None
    """PEFT's type, matched exactly, because a subclass may compute something else."""
    layer_names: ClassVar[tuple[str, ...]] = ()
    """Dotted names of further types of PEFT, whose modules import packages that are often not installed."""
    mixin: ClassVar[type[SwappedModule]]
    """The class that binding puts on an instance of the type."""
    library: ClassVar[str] = "peft"
    """The library that computes the layer where our ops do not."""

    def __init__(self, name: str, layer: nn.Module, key: str) -> None:
        self.name, self.layer, self.key = name, layer, key
        self._trainable = [parameter.requires_grad for parameter in self.parameters()]
        self._dropout_p: list[tuple[nn.Dropout, float, float]] = []

    @staticmethod
    def keys(layer: Any) -> list[str]:
        """Return the names of a layer's adapters."""
        return sorted(layer._get_available_adapters()) if isinstance(layer, BaseTunerLayer) else []

    @staticmethod
    def parameters_of(layer: Any, key: str) -> list[nn.Parameter]:
        """Return the parameters of one adapter of a layer, in any container of the layer."""
        holders = [getattr(layer, name) for name in getattr(layer, "adapter_layer_names", ())]
        held = [holder[key] for holder in holders if hasattr(holder, "keys") and key in holder]
        return [p for item in held for p in ([item] if isinstance(item, nn.Parameter) else item.parameters())]

    @staticmethod
    @abstractmethod
    def refusal(layer: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
        """Return why a call of this layer cannot take the fast path, in a few words; None if it can."""

    @staticmethod
    def op(layer: nn.Module) -> str:
        """Return the op that computes the layer on the fast path; for some layers their last call decides."""
        return "lora"

    @staticmethod
    def note(layer: nn.Module) -> str:
        """Return a remark for the user about a layer that takes the fast path."""
        return ""

    @abstractmethod
    def evidence(self, statistics: AdapterStatistics | None = None) -> ScoreInputs:
        """Return the data from which a score is computed."""

    def bytes_once_frozen(self, output: Tensor) -> int:
        """Return the bytes that a call retains only once the adapter is frozen, if a gradient passes through it.

        Args:
            output: the layer's output.
        """
        return 0

    def is_present(self) -> bool:
        """Whether PEFT still has the adapter: it may have been deleted. Every step checks this for all adapters."""
        return self.key in adapter_keys(self.layer)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's own parameters."""
        return adapter_parameters(self.layer, self.key)

    def traits(self) -> dict[str, Any]:
        """Return, as JSON values, the traits that must match when a saved state is loaded; no weights."""
        return {"shapes": [list(parameter.shape) for parameter in self.parameters()]}

    def dropouts(self) -> list[nn.Dropout]:
        """The adapter's own dropout modules."""
        return []

    @property
    def state(self) -> LayerState | None:
        """The layer's state; None if the layer is not bound (any more)."""
        return self.layer.__dict__.get(STATE)

    @property
    def trainable(self) -> bool:
        """Whether any of the adapter's parameters requires grad."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def freeze(self, *, keep_dropout: bool = False) -> None:
        """Stop training the adapter, and switch off its dropout, which has no use in a fixed adapter.

        Args:
            keep_dropout: leave the adapter's dropout on.
        """
        if self.state is not None:
            self.state.frozen.add(self.key)
            self.state.undo[self.key] = self
        self.reassert()
        if not keep_dropout:
            for dropout in self.dropouts():
                off = float("0")  # a separate object: `restore` compares by identity, to keep a value of the user
                self._dropout_p.append((dropout, dropout.p, off))
                dropout.p = off

    def reassert(self) -> None:
        """Keep the adapter frozen: PEFT sets requires_grad again when adapters are switched, loaded or re-enabled."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            parameter.grad = None

    def restore(self) -> None:
        """Let the adapter train with its dropout, as before it was frozen; a dropout that was changed since stays."""
        if self.state is not None:
            self.state.frozen.discard(self.key)
            self.state.undo.pop(self.key, None)
        for parameter, trainable in zip(self.parameters(), self._trainable, strict=False):
            parameter.requires_grad_(trainable)
        while self._dropout_p:
            dropout, p, off = self._dropout_p.pop()
            if dropout.p is off:
                dropout.p = p


_ADAPTERS: dict[str, type[Adapter]] = {}


def dotted_name(kind: type) -> str:
    """Return a class's full name, which identifies the class without an import."""
    return f"{kind.__module__}.{kind.__qualname__}"


def register_adapter(kind: type[Adapter]) -> type[Adapter]:
    """Class decorator: register a kind of adapter for `bind` and `explain`."""
    names = kind.layer_names if kind.layer_type is None else (dotted_name(kind.layer_type), *kind.layer_names)
    _ADAPTERS.update(dict.fromkeys(names, kind))
    return kind


def adapter_of(layer: nn.Module) -> type[Adapter] | None:
    """Return the kind of adapter of a module, bound or not; None if the module has no supported adapter."""
    return _ADAPTERS.get(dotted_name(original_type(layer)))


def peft_kind(layer: nn.Module) -> str | None:
    """Return a name of an adapter layer's type, such as "lora.Linear"; None for a module that is no adapter layer."""
    if not isinstance(layer, BaseTunerLayer) and adapter_of(layer) is None:
        return None
    kind = original_type(layer)
    package = kind.__module__.split(".")
    method = package[package.index("tuners") + 1] if "tuners" in package else package[0]
    return f"{method}.{kind.__name__}"
