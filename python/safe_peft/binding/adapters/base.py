"""What the policy asks of an adapter, and the registry of the PEFT layer types it knows."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from safe_kernels import AdapterStatistics

from ..class_swap import STATE, Swapped, original_type
from .evidence import Evidence


class LayerState:
    """What binding keeps about one layer: plain Python, so that neither a state dict nor an optimizer ever sees it.

    Args:
        frozen: keys of the adapters that the ledger calls frozen, whatever their requires_grad says.
        observe: by key, gives the statistics that the coming forward is to add to; empty unless a scoring is due.
        owner: the binding of the freezer that decides about this layer, as long as there is one.
        fused: the last call computed the base layer and its adapter in one.
        undo: by key, the adapter that a freezer froze, which knows what it was before.
    """

    __slots__ = ("frozen", "fused", "observe", "owner", "undo")

    def __init__(self) -> None:
        self.frozen: set[str] = set()
        self.observe: dict[str, Callable[[Tensor], AdapterStatistics | None]] = {}
        self.owner: weakref.ref[Any] | None = None
        self.fused = False
        self.undo: dict[str, Adapter] = {}


def adapter_keys(layer: nn.Module) -> list[str]:
    """Return PEFT's names of the adapters in one of its layers.

    Args:
        layer: any adapter layer of PEFT's.
    """
    return sorted(layer._get_available_adapters()) if isinstance(layer, BaseTunerLayer) else []


def active_keys(layer: Any, present: Container[str]) -> list[str]:
    """Return which of a PEFT layer's adapters are active.

    Args:
        layer: any adapter layer of PEFT's.
        present: the adapters it has: `adapter_keys`, or, where a forward waits for it, a dict of them as it stands.
    """
    active = layer._active_adapter
    if type(active) is str:
        return [active] if active in present else []
    return [key for key in active if key in present]


def adapter_parameters(layer: nn.Module, key: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter of a PEFT layer, whatever holds them there.

    Args:
        layer: any adapter layer of PEFT's.
        key: PEFT's name of the adapter.
    """
    holders = [getattr(layer, name) for name in getattr(layer, "adapter_layer_names", ())]
    held = [holder[key] for holder in holders if hasattr(holder, "keys") and key in holder]
    return [p for item in held for p in ([item] if isinstance(item, nn.Parameter) else item.parameters())]


class Adapter(ABC):
    """One adapter of one bound layer.

    Args:
        name: the layer's path in the model.
        layer: PEFT's layer.
        key: PEFT's name of the adapter in that layer, mostly "default".
    """

    layer_type: ClassVar[type[nn.Module]]
    """PEFT's type, matched exactly, since a subclass may compute something else."""
    layer_names: ClassVar[tuple[str, ...]] = ()
    """Dotted names of further types of PEFT's: of those whose module imports a package that few have installed."""
    mixin: ClassVar[type[Swapped]]
    """What binding puts on an instance of it."""

    def __init__(self, name: str, layer: nn.Module, key: str) -> None:
        self.name = name
        self.layer = layer
        self.key = key
        self._trainable = [parameter.requires_grad for parameter in self.parameters()]
        self._dropout_p: list[tuple[nn.Dropout, float, float]] = []

    @staticmethod
    @abstractmethod
    def refusal(layer: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
        """Why a call of this layer cannot take the fast path, in a few words; None if it can."""

    @staticmethod
    def note(layer: nn.Module) -> str:
        """What a user may want to know about a layer that takes the fast path."""
        return ""

    @abstractmethod
    def evidence(self, statistics: AdapterStatistics | None = None) -> Evidence:
        """What is known about the adapter now."""

    def is_present(self) -> bool:
        """Whether PEFT still has it: it may have been deleted. Asked of all in every step."""
        return self.key in adapter_keys(self.layer)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's own parameters."""
        return adapter_parameters(self.layer, self.key)

    def traits(self) -> dict[str, Any]:
        """Return, as JSON values, what a saved state has to find again: what is computed, without the weights."""
        return {"shapes": [list(parameter.shape) for parameter in self.parameters()]}

    def dropouts(self) -> list[nn.Dropout]:
        """The adapter's own dropout modules."""
        return []

    @property
    def state(self) -> LayerState | None:
        """What binding keeps about the layer; None if it is not bound (any more)."""
        return self.layer.__dict__.get(STATE)

    @property
    def trainable(self) -> bool:
        """Whether any of its parameters requires grad."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def freeze(self, *, keep_dropout: bool = False) -> None:
        """Stop training the adapter, and switch off its dropout, since noise in a fixed adapter only costs.

        Args:
            keep_dropout: leave its dropout on.
        """
        if self.state is not None:
            self.state.frozen.add(self.key)
            self.state.undo[self.key] = self
        self.hold()
        if not keep_dropout:
            for dropout in self.dropouts():
                off = float("0")  # an object of its own, by which a value that the user sets meanwhile is told from it
                self._dropout_p.append((dropout, dropout.p, off))
                dropout.p = off

    def hold(self) -> None:
        """Keep it frozen: PEFT sets requires_grad again when adapters are switched, loaded or re-enabled."""
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            parameter.grad = None

    def restore(self) -> None:
        """Make it train, and its dropout work, as before it was frozen; a dropout that was changed since stays so."""
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
    """Return a class's full name, by which it is known without being imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


def register_adapter(kind: type[Adapter]) -> type[Adapter]:
    """Class decorator: make a kind of adapter known to `bind` and `explain`."""
    _ADAPTERS.update(dict.fromkeys((dotted_name(kind.layer_type), *kind.layer_names), kind))
    return kind


def adapter_of(layer: nn.Module) -> type[Adapter] | None:
    """Return the kind of adapter a module holds, bound or not; None if it is none we know.

    Example:
        >>> adapter_of(nn.Linear(2, 2)) is None
        True
    """
    return _ADAPTERS.get(dotted_name(original_type(layer)))


def peft_kind(layer: nn.Module) -> str | None:
    """Return how PEFT prints a layer's type, such as "lora.Linear"; None if it is no adapter layer of PEFT's.

    Example:
        >>> peft_kind(nn.Linear(2, 2)) is None
        True
    """
    if not isinstance(layer, BaseTunerLayer):
        return None
    kind = original_type(layer)
    package = kind.__module__.split(".")
    method = package[package.index("tuners") + 1] if "tuners" in package else package[0]
    return f"{method}.{kind.__name__}"
