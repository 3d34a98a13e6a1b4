"""Bottleneck adapters (`safe_peft.bottleneck`), with `safe_kernels.bottleneck` from the base layer's output on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import safe_kernels

from ...bottleneck.layer import BottleneckLayer
from ..class_swap import STATE, autocasts, is_hooked, own_forward
from ..code import Methods, own_methods, replaced, watched
from .base import FLOATS, TENSORS, Adapter, LayerState, active_keys, register_adapter
from .lora import DROPOUTS, LoraAdapter, observed, refuse_tensor
from .observed import ObservedLayer

_METHODS = own_methods(
    (BottleneckLayer, "forward"),
    (BottleneckLayer, "__call__"),
    (BottleneckLayer, "_add"),
    (BottleneckLayer, "outputs"),
    (nn.Linear, "forward"),
    (nn.Dropout, "forward"),
    (nn.Identity, "forward"),
)


def refusal(layer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return why a call must take the adapter's own path, in a few words; None if the op can compute it.

    Every forward calls this function, so it reads only types and flags. Without `args`, only the layer is checked.
    """
    if layer._disable_adapters:
        return "adapters are disabled"
    keys = active_keys(layer, layer._modules["bottleneck_down"]._modules)
    if not keys:
        return "no active adapter in this layer"
    if len(keys) > 1:
        return "several bottleneck adapters are active"
    if (reason := refuse_code(layer, _METHODS)) is not None:
        return reason
    return _refuse_adapter(layer, keys[0]) or (_refuse_input(layer, args[0]) if args else None)


def refuse_code(layer: Any, methods: Methods) -> str | None:
    """Refuse a layer whose code is not the library's own, or whose inner calls are watched."""
    if "forward" in layer.__dict__:
        return "forward is replaced on the layer itself (device hooks, for instance)"
    if (reason := replaced(methods)) is not None:
        return reason
    return "hooks on the calls of all modules, those of the adapter among them" if watched() else None


def _refuse_adapter(layer: Any, key: str) -> str | None:
    modules = [layer._modules[name]._modules[key] for name in ("bottleneck_down", "bottleneck_up")]
    dropout = layer._modules["bottleneck_dropout"]._modules[key]
    if any(type(module) is not nn.Linear for module in modules):
        return f"adapter is made of {' and '.join(type(module).__name__ for module in modules)}, not of nn.Linear"
    parameters = [module._parameters.get(name) for module in modules for name in ("weight", "bias")]
    if any(type(parameter) not in TENSORS for parameter in parameters):
        return "a weight or bias of the adapter is not an ordinary parameter"
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None}
    if len(dtypes) > 1 or not dtypes <= FLOATS:
        return f"adapter dtype {' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
    if type(layer.scaling[key]) not in (int, float):
        return f"scaling is a {type(layer.scaling[key]).__name__}"
    if type(dropout) not in DROPOUTS or dropout.__dict__.get("inplace", False):
        return f"dropout module {type(dropout).__name__} is not nn.Dropout, or works in place"
    if any(map(is_hooked, (*modules, dropout))):
        return "hooks on the layers of the adapter, which the fast path would not run"
    return None


def _refuse_input(layer: Any, x: Any) -> str | None:
    if (reason := refuse_tensor(x)) is not None:
        return reason
    if not getattr(layer, "cast_input_dtype_enabled", True) and not autocasts(x):
        return "casting of inputs is switched off"
    return None


class SafeBottleneck(ObservedLayer):
    """A layer with a bottleneck adapter, which `safe_kernels.bottleneck` computes if `refusal` returns None."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: LayerState | None = self.__dict__.get(STATE)
        if state is None:
            return own_forward(self, x, *args, **kwargs)
        if refusal(self, (x, *args), kwargs) is not None:
            return super().forward(x, *args, **kwargs)
        own: Any = self
        (key,) = active_keys(own, own._modules["bottleneck_down"]._modules)
        out, inner = own.outputs(x, *args, **kwargs)
        scored = self.training and not torch.compiler.is_compiling()  # a scoring step is not compiled
        statistics = observed(state, [key], out).get(key) if scored else None
        down, up, dropout = (own._modules[f"bottleneck_{name}"]._modules[key] for name in ("down", "up", "dropout"))
        weights = down.weight, down.bias, up.weight, up.bias
        if key in state.frozen:  # PEFT may have set requires_grad of a frozen adapter again
            weights = tuple(p.detach() if p.requires_grad else p for p in weights)
        drops = dropout.training and type(dropout) is nn.Dropout
        return safe_kernels.bottleneck(
            inner if own.parallel[key] else out,
            out,
            *weights,
            own.kind[key],
            own.scaling[key],
            dropout_p=dropout.p if drops else 0.0,
            statistics=statistics,
        )

    def _observe(self, due: Any, call: Any, args: Any, kwargs: Any) -> Any:
        """Score on the adapter's own path, which may call the layer several times; each call takes the MLP's input."""
        taken = self.__dict__["_input"]
        value = None if taken is None else taken.value

        def again() -> Any:
            if taken is not None:
                taken.value = value
            return call()

        return super()._observe(due, again, args, kwargs)


@register_adapter
class BottleneckAdapter(LoraAdapter):
    """One bottleneck adapter of one layer. For scores, W_down is `lora_A` and W_up is `lora_B`.

    `relative_norm` and `drift` compare the product of the two with the identity, which the skip connection adds.
    """

    layer_type: ClassVar[type[nn.Module]] = BottleneckLayer
    mixin: ClassVar[type[ObservedLayer]] = SafeBottleneck
    refusal = staticmethod(refusal)

    @staticmethod
    def op(layer: nn.Module) -> str:
        return "bottleneck"

    def is_present(self) -> bool:
        return self.key in self.layer._modules["bottleneck_down"]._modules

    def traits(self) -> dict[str, Any]:
        is_parallel = self.layer.parallel[self.key]
        return {**Adapter.traits(self), "scaling": self.scaling(), "kind": self.kind(), "parallel": is_parallel}

    def kind(self) -> str | None:
        """Return the activation's name."""
        return self.layer.kind[self.key]

    def dropouts(self) -> list[nn.Dropout]:
        dropout = self.layer.bottleneck_dropout[self.key]
        return [dropout] if isinstance(dropout, nn.Dropout) else []

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.layer.bottleneck_down[self.key].weight, self.layer.bottleneck_up[self.key].weight

    def base_weight(self) -> Tensor:
        return torch.eye(self.layer.out_features, device=self.pair()[0].device)

    def bytes_once_frozen(self, output: Tensor) -> int:
        """Return the bytes that the fast path retains for a gradient that passes the frozen adapter: see `Adapter`."""
        if self.refusal(self.layer) is not None or not self.layer.__dict__.get(STATE):
            return 0
        weight = self.pair()[0]
        r, dtype = weight.shape[0], weight.dtype  # as csrc/autograd/adapter_input.h: autocast leaves float64 alone
        if dtype != torch.float64 and autocasts(output):
            dtype = torch.get_autocast_dtype(output.device.type)
        rows = output.numel() // max(1, output.shape[-1])
        return rows * (-(-r // 8) if self.kind() == "relu" else r * dtype.itemsize)
