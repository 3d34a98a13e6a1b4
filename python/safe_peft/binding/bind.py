"""Puts the fast path under a PEFT model, layer by layer; the model object stays what it is."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

from ..distributed.wrappers import short_name, unwrap, walk
from ..errors import BindingError, ConfigError
from .adapters import Adapter, LayerState, adapter_of, peft_kind
from .adapters.base import adapter_keys
from .adapters.observed import mixin_for
from .blocks import PARTS, bind_blocks, transformer_blocks
from .class_swap import STATE, is_bound, put_on, take_off


@dataclass
class Binding:
    """What `bind` did to a model, and how to undo it.

    Args:
        layers: every bound adapter layer by its path in the model; also those that an earlier `bind` had bound.
        recompute: names of transformer blocks that, once everything in them is frozen, retain their input alone and run
            again in backward: exact, less memory, more time. May be changed at any time; `blocks` are their names.
        blocks: names of the transformer blocks, lowest first.

    Example:
        >>> with bind(model) as binding:  # doctest: +SKIP
        ...     model(**batch)
    """

    layers: dict[str, nn.Module]
    recompute: set[str] = field(default_factory=set)
    blocks: tuple[str, ...] = ()
    _own: list[nn.Module] = field(default_factory=list, repr=False)
    _freezer: weakref.ref[Any] | None = field(default=None, repr=False)

    def live_adapters(self) -> list[Adapter]:
        """Return the adapters that have a parameter which requires grad, in the model's order.

        A layer with more than one of them has its path followed by the adapter's key in brackets.

        Example:
            >>> [adapter.name for adapter in bind(model).live_adapters()]  # doctest: +SKIP
            ['encoder.layer.0.attention.self.query', ...]
        """
        found = []
        for name, layer in self.layers.items():
            kind = adapter_of(layer)
            adapters = [] if kind is None else [kind(name, layer, key) for key in adapter_keys(layer)]
            live = [adapter for adapter in adapters if adapter.trainable]
            for adapter in live if len(live) > 1 else ():
                adapter.name = f"{name}[{adapter.key}]"
            found += live
        return found

    def claim(self) -> list[Adapter]:
        """Hand the live adapters to one freezer, until `release` or until it is forgotten.

        Raises:
            BindingError: None is live, or another freezer has them.
        """
        if self._owner() is not None:
            gc.collect()  # an exception's traceback may have kept a freezer in a cycle
        if self._owner() is not None:
            raise BindingError(
                "this model has an AdapterFreezer already: call detach() on that freezer (callback.freezer.detach() if "
                "a SafeCallback made it), or safe_peft.bind(model).release(keep_frozen=False) if it cannot be reached; "
                "either lets everything train again that it froze."
            )
        adapters = self.live_adapters()
        if not adapters:
            raise BindingError("no adapter trains: requires_grad is False everywhere; call model.set_adapter(...).")
        for state in self._states():
            state.owner, state.observe = weakref.ref(self), {}
        return adapters

    def release(self, keep_frozen: bool = True) -> None:
        """Let another freezer have the adapters.

        Args:
            keep_frozen: what was frozen stays so, and is none of the other freezer's business; otherwise a freezer that
                is at work is detached, and everything trains again, with its dropout, as before it was frozen.

        Example:
            >>> safe_peft.bind(model).release(keep_frozen=False)  # doctest: +SKIP
        """
        owner = self._owner()
        if not keep_frozen and owner is not None and (freezer := owner.freezer()) is not None:
            freezer.detach()
        for state in self._states():
            for adapter in () if keep_frozen else tuple(state.undo.values()):
                adapter.restore()
            state.owner, state.observe, state.undo = None, {}, {}

    def freezer(self) -> Any:
        """Return the freezer that decides about these layers; None if there is none (any more)."""
        owner = self._owner()
        return owner._freezer() if owner is not None and owner._freezer is not None else None

    def detach(self) -> None:
        """Give every module that this binding bound its own class back. Doing it twice does no harm.

        A freezer that was made meanwhile and is still at work needs them bound: then its own `detach` does it.
        """
        owner = self._owner()
        if owner is not None and owner is not self:
            owner._own += self._own
        else:
            for module in self._own:
                take_off(module)
        self._own = []

    def _states(self) -> list[LayerState]:
        return [layer.__dict__[STATE] for layer in self.layers.values() if is_bound(layer)]

    def _owner(self) -> Binding | None:
        owners = [owner for state in self._states() if state.owner and (owner := state.owner()) is not None]
        return owners[0] if owners else None

    def __enter__(self) -> Binding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def bind(model: nn.Module, *, parts: Collection[str] = PARTS) -> Binding:
    """Bind every adapter layer of a model that has a fast path, and what retains more than it needs around them.

    Nothing is frozen or scored. In addition to the adapters this serves norms, MLPs and dropouts, and lets the graph
    begin at the lowest transformer block in which anything trains.

    The model object, its state dict's keys, `save_pretrained`, `isinstance` and what is printed stay as they are. A
    call that the fast path does not cover runs PEFT's own code; `explain` says which and why. Copies and pickles of a
    bound model are ordinary PEFT models. Layers that are bound already stay bound, and belong to the earlier binding.

    Args:
        model: a PEFT model, or anything that holds its layers; DDP's wrapper and `torch.compile`'s are looked through.
        parts: what to serve in addition to the adapters: "norms", "mlps" (with their activations), "attention" (that
            which is written out in Python) and "dropouts".

    Returns:
        The binding, whose `detach` undoes it; also a context manager.

    Raises:
        BindingError: The model has no layer that can be bound.
        ConfigError: `parts` names something else.

    Example:
        >>> binding = bind(model)  # doctest: +SKIP
        >>> model(**batch).loss.backward()  # doctest: +SKIP
        >>> binding.detach()  # doctest: +SKIP
    """
    if not isinstance(parts, Collection) or isinstance(parts, str) or not set(parts) <= set(PARTS):
        raise ConfigError(f"parts: expected some of {', '.join(PARTS)}, got {parts!r}.")
    modules = list(walk(unwrap(model)))
    layers = {short_name(name): module for name, module in modules if adapter_of(module) is not None}
    if not layers:
        raise BindingError(_nothing_to_bind(model, [module for _, module in modules]))
    own = [layer for layer in layers.values() if not is_bound(layer)]
    for layer in own:
        put_on(layer, mixin_for(layer, adapter_of(layer).mixin), LayerState())  # type: ignore[union-attr]
    bound, recompute = bind_blocks(unwrap(model), parts)
    return Binding(layers, recompute, tuple(transformer_blocks(unwrap(model))), own + bound)


def _nothing_to_bind(model: nn.Module, modules: list[nn.Module]) -> str:
    kinds = Counter(kind for module in modules if (kind := peft_kind(module)) is not None)
    if not kinds:
        return f"{type(model).__name__} has no adapter layer of PEFT's; pass what peft.get_peft_model returned."
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{type(model).__name__} has no layer that can be bound: expected lora.Linear, found {found}."
