"""Puts the fast path under a PEFT model, layer by layer, in place."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..distributed.wrappers import short_name, unwrap, walk
from ..errors import BindingError, ConfigError
from .adapters import Adapter, LayerState, adapter_of, peft_kind
from .adapters.base import adapter_keys
from .adapters.observed import mixin_for
from .blocks import PARTS, bind_blocks, transformer_blocks
from .class_swap import STATE, is_bound, restore_class, swap_class


@dataclass
class Binding:
    """The result of `bind`; `detach` undoes it.

    Args:
        layers: every bound adapter layer by its path in the model, including the layers of an earlier `bind`.
        blocks: names of all transformer blocks, lowest first.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        >>> with bind(model) as binding:
        ...     model(torch.ones(2, 8)).sum().backward()
        >>> list(binding.layers)
        ['0']
    """

    layers: dict[str, nn.Module] = field(repr=False)
    blocks: tuple[str, ...] = ()
    _recompute: set[str] = field(default_factory=set, repr=False)
    _own: list[nn.Module] = field(default_factory=list, repr=False)
    _freezer: weakref.ref[Any] | None = field(default=None, repr=False)

    @property
    def recompute(self) -> set[str]:
        """Names of transformer blocks to recompute; you may change this set, or assign another one, at any time.

        Once everything in such a block is frozen, the block retains only its input and runs again in backward: the same
        results, less memory, more time.

        Raises:
            BindingError: An assigned name is not in `blocks`.

        Example:
            >>> from peft import LoraConfig, get_peft_model
            >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
            >>> binding = bind(model)
            >>> binding.recompute = binding.blocks[:-1]
        """
        return self._recompute

    @recompute.setter
    def recompute(self, names: Iterable[str]) -> None:
        chosen = {names} if isinstance(names, str) else set(names)
        if unknown := sorted(chosen.difference(self.blocks)):
            raise BindingError(f"recompute: {unknown} are no blocks of this model; its blocks are {list(self.blocks)}.")
        self._recompute.clear()
        self._recompute.update(chosen)

    def live_adapters(self) -> list[Adapter]:
        """Return the adapters with a parameter that requires grad, in the model's order.

        An adapter's name is the path of its layer. If a layer has several live adapters, the adapter's key follows in
        brackets.

        Example:
            >>> from peft import LoraConfig, get_peft_model
            >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
            >>> [adapter.name for adapter in bind(model).live_adapters()]
            ['0']
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
        """Assign the live adapters to one freezer, until `release`, or until no reference to this binding is left.

        Raises:
            BindingError: No adapter trains, or another freezer has the adapters.
        """
        if self._owner() is not None:
            gc.collect()  # the traceback of an exception may keep a freezer alive in a cycle
        if self._owner() is not None:
            raise BindingError(
                "this model has an AdapterFreezer already: call detach() on that freezer (callback.freezer.detach() if "
                "a SafeCallback made it), or safe_peft.bind(model).release(keep_frozen=False) if you have no reference "
                "to it; after either call its frozen adapters train again."
            )
        adapters = self.live_adapters()
        if not adapters:
            raise BindingError(
                "no adapter trains: requires_grad is False everywhere; call model.set_adapter(...), or load the model "
                "with PeftModel.from_pretrained(..., is_trainable=True)."
            )
        for state in self._states():
            state.owner, state.observe = weakref.ref(self), {}
        return adapters

    def release(self, keep_frozen: bool = True) -> None:
        """Make the adapters available to another freezer.

        Args:
            keep_frozen: frozen adapters stay frozen, and the other freezer does not see them. Otherwise an active
                freezer is detached, and all adapters train again, with their dropout, as before they were frozen.

        Example:
            >>> from peft import LoraConfig, get_peft_model
            >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
            >>> bind(model).release(keep_frozen=False)
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
        """Unbind every module that this binding bound. A second call has no effect.

        If a freezer is active on the model, the modules stay bound until the freezer's own `detach`.
        """
        owner = self._owner()
        if owner is not None and owner is not self:
            owner._own += self._own
        else:
            for module in self._own:
                restore_class(module)
        self._own = []

    def _states(self) -> list[LayerState]:
        return [layer.__dict__[STATE] for layer in self.layers.values() if is_bound(layer)]

    def _owner(self) -> Binding | None:
        owners = [owner for state in self._states() if state.owner and (owner := state.owner()) is not None]
        return owners[0] if owners else None

    def __enter__(self) -> Binding:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def bind(model: nn.Module, *, parts: Collection[str] = PARTS) -> Binding:
    """Put the fast path under every supported adapter layer of a model, and under its norms, MLPs and dropouts.

    Nothing is frozen or scored. The graph begins at the lowest transformer block that has something to train.

    The model object stays an ordinary PEFT model: the state dict's keys, `save_pretrained`, `isinstance` and the
    printed model do not change. PEFT's own code computes a call that the fast path does not cover; `explain` shows
    which calls, and why. Copies and pickles of a bound model are unbound PEFT models. Layers that are bound already
    stay bound, and belong to the earlier binding.

    Args:
        model: a PEFT model, a model with bottleneck adapters of AdapterHub, or a module that contains one. DDP's
            wrapper and `torch.compile`'s wrapper are allowed.
        parts: what to bind in addition to the adapters: "norms", "mlps" (with their activations), "attention" (only
            attention that is written in Python) and "dropouts".

    Returns:
        The binding. Its `detach` undoes it. It is also a context manager.

    Raises:
        BindingError: The model has no layer that can be bound.
        ConfigError: `parts` contains an unknown name.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        >>> binding = bind(model)
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> binding.detach()
    """
    if not isinstance(parts, Collection) or isinstance(parts, str) or not set(parts) <= set(PARTS):
        raise ConfigError(f"parts: expected a list of some of {', '.join(PARTS)}, got {parts!r}.")
    modules = list(walk(unwrap(model)))
    layers = {short_name(name): module for name, module in modules if adapter_of(module) is not None}
    if not layers:
        raise BindingError(_nothing_to_bind(model, [module for _, module in modules]))
    own: list[nn.Module] = []
    try:
        for layer in layers.values():
            if not is_bound(layer):
                swap_class(layer, mixin_for(layer, adapter_of(layer).mixin), LayerState())  # type: ignore[union-attr]
                own.append(layer)
        recompute = bind_blocks(unwrap(model), parts, own)
    except BaseException:  # also Ctrl-C: without a `Binding`, the bound modules could not be unbound
        for module in own:
            restore_class(module)
        raise
    return Binding(layers, tuple(transformer_blocks(unwrap(model))), recompute, own)


def _nothing_to_bind(model: nn.Module, modules: list[nn.Module]) -> str:
    kinds = Counter(kind for module in modules if (kind := peft_kind(module)) is not None)
    if not kinds:
        return (
            f"{type(model).__name__} has no adapter layer of PEFT, such as those of LoRA; pass the model that "
            "peft.get_peft_model returned. Prompt and prefix tuning have no such layers."
        )
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{type(model).__name__} has no layer that can be bound: expected lora.Linear, found {found}."
