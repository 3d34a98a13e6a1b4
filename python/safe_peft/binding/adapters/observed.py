"""Freezing and scoring on PEFT's own path: the score is computed from the layer's outputs.

No kernel computes the sums there. So in a scoring step, the layer's features without and with the adapter are sampled
during its forward. The score is exact up to the rounding of the features' dtype. In 16 bits, an adapter that changes
the features by less than this rounding has the score 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize
from torch.utils.checkpoint import get_device_states

from safe_kernels import AdapterStatistics
from safe_kernels.retention import announce_reader

from ..class_swap import STATE, SwappedModule, autocasts, is_bound, is_of_user, own_forward
from .base import LayerState, active_keys, adapter_keys, adapter_parameters, peft_kind, unscored

Call = Callable[[], Any]


class ObservedLayer(SwappedModule):
    """A LoRA layer on PEFT's own path: its frozen adapters stay frozen, and a scoring step scores its adapters."""

    features_dim: ClassVar[int] = -1
    """The dimension of the layer's output that contains the features; the other dimensions are rows."""
    base_layer: nn.Module
    disable_adapters: bool
    merged: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not is_bound(self):
            return own_forward(self, *args, **kwargs)
        return self._watch(super().forward, args, kwargs)

    def _watch(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        state: LayerState = self.__dict__[STATE]
        for parameter in (p for key in state.frozen for p in adapter_parameters(self, key) if p.requires_grad):
            parameter.requires_grad_(False)  # PEFT's own path reads only requires_grad
        _announce(self, args)
        scored = self.training and not torch.compiler.is_compiling()  # the forwards of a scoring step run uncompiled
        if scored and state.observe and (due := self._due(state, kwargs)):
            return self._observe(due, lambda: call(*args, **kwargs), args, kwargs)
        return call(*args, **kwargs)

    def _due(self, state: LayerState, kwargs: Mapping[str, Any]) -> dict[str, Sample]:
        """Return the adapters that the next call computes and that need a score."""
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return {}
        keys = [key for key in active_keys(self, adapter_keys(self)) if key in state.observe]
        return {key: Sample(state.observe[key], self.features_dim) for key in keys}

    def _observe(self, due: Mapping[str, Sample], call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        output = self._sample_base(due, call, args, kwargs)
        together = len(active_keys(self, adapter_keys(self))) > 1
        for key, sample in due.items():
            if together:  # the output has the sum of all adapters, so each needs a call of its own
                with aside(self, args, only=key):
                    sample.end(call())
            else:
                sample.end(output)
        return output

    def _sample_base(self, due: Mapping[str, Sample], call: Call, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Call the layer, and sample its base layer's output before anything is added to it in place."""

        def begin(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for sample in due.values():
                sample.begin(output)

        hook = self.base_layer.register_forward_hook(begin)
        try:
            return call()
        finally:
            hook.remove()


class Replaced(ObservedLayer):
    """A layer whose `forward` was replaced before it was bound, for example by device hooks: its `__call__` is used."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_bound(self) or "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        return self._watch(super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute PEFT's forward, which the replacement calls. Without one, do as `ObservedLayer` does."""
        if "forward" in self.__dict__:
            return own_forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


@cache
def _replaced(mixin: type[SwappedModule]) -> type[SwappedModule]:
    return type(mixin.__name__, (Replaced, mixin), {})


def mixin_for(layer: nn.Module, mixin: type[SwappedModule]) -> type[SwappedModule]:
    """Return the class that binding puts on a layer, from the usual class for such layers."""
    return _replaced(mixin) if "forward" in layer.__dict__ else mixin  # type: ignore[arg-type]


def no_kernel(layer: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str:
    """Return why a kind of layer always takes PEFT's path: the `refusal` of an adapter type without a kernel."""
    return f"{peft_kind(layer)} has no kernel"


class Sample:
    """The sampled rows of a layer's features, without one adapter and with it."""

    def __init__(self, observe: Callable[[Tensor], AdapterStatistics | None], features_dim: int) -> None:
        self._observe = observe
        self._features_dim = features_dim
        self._statistics: AdapterStatistics | None = None
        self._base = torch.empty(0)

    def begin(self, base: Any) -> None:  # with gradients on or off as in the forward: observers check this
        if isinstance(base, Tensor) and base.is_floating_point():
            features = base.detach().movedim(self._features_dim, -1)
            self._statistics = self._observe(features)
            if self._statistics is not None:
                self._base = self._statistics.take(features)[0]

    @torch.no_grad()
    def end(self, output: Any) -> None:
        if self._statistics is not None:
            features = output.movedim(self._features_dim, -1)
            self._statistics.add_features(self._base, *self._statistics.take(features))


def _announce(layer: Any, args: tuple[Any, ...]) -> None:
    """Announce that PEFT's lora_A retains its input, so that the norm before it retains the same tensor."""
    if not args or not isinstance(args[0], Tensor) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return  # hooks may write to x before lora_A retains it
    modules, x = layer._modules, args[0]
    if autocasts(x) and torch.get_autocast_dtype(x.device.type) != x.dtype:
        return  # lora_A keeps a copy of x in autocast's dtype
    for key in active_keys(layer, adapter_keys(layer)):
        lora_A = modules["lora_A"]._modules.get(key) if "lora_A" in modules else None
        if type(lora_A) is not nn.Linear or layer.disable_adapters or layer.merged:
            continue
        dropout, weight = modules["lora_dropout"]._modules[key], lora_A._parameters.get("weight")
        if any(m._forward_hooks or m._forward_pre_hooks for m in (modules["base_layer"], dropout, lora_A)):
            continue
        drops = dropout.training and getattr(dropout, "p", 0.0) > 0.0
        if weight is not None and weight.requires_grad and weight.dtype == x.dtype and not drops:
            announce_reader(x)


@contextmanager
def aside(layer: Any, args: tuple[Any, ...], *, only: str | None = None) -> Iterator[None]:
    """Run calls outside of the forward: without graph and scoring, and without effect on random numbers and modules.

    `only` is then the only active adapter of the layer. PEFT's own function would set requires_grad too.
    """
    devices, _ = get_device_states(*args)
    caches, modules = parametrize._cache_enabled, list(layer.modules())
    with unscored(modules), torch.no_grad(), torch.random.fork_rng(devices=devices), _restored(modules):
        try:
            if only is not None:
                layer._active_adapter = [only]
            parametrize._cache_enabled = 0  # a value without a graph would give no gradient later
            yield
        finally:
            parametrize._cache_enabled = caches


@contextmanager
def _restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo the changes that calls make to modules, such as running statistics, and call none of the user's hooks.

    A hook may collect outputs for the loss, and these would have no graph.
    """
    found = [(module.__dict__, module.__dict__.copy()) for module in modules]
    everywhere = [(hooks, hooks.copy()) for hooks in _HOOKS_ON_ALL]
    try:
        for own, before in found:
            own.update((name, value.copy()) for name, value in before.items() if type(value) in _CONTAINERS)
            own["_parameters"] = before["_parameters"]  # FSDP replaces parameters in it
            own["_buffers"] = {name: None if b is None else b.clone() for name, b in before["_buffers"].items()}
            own.update((name, _libraries_only(before[name])) for name in ("_forward_hooks", "_forward_pre_hooks"))
        for hooks, before in everywhere:
            _put(hooks, _libraries_only(before))
        yield
    finally:
        for own, before in found:
            _put(own, before)
        for hooks, before in everywhere:
            _put(hooks, before)


_CONTAINERS = frozenset({list, dict, set, OrderedDict})
_HOOKS_ON_ALL: Any = (global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks)


def _libraries_only(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if not is_of_user(hook))


def _put(target: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    target.clear()
    target.update(content)
