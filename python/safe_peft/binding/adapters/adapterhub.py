"""Bottleneck adapters of AdapterHub's `adapters`: `safe_kernels.bottleneck` computes the products of one adapter.

The package is not imported: its layers are known by name. Their own forward computes everything around the products
(residual, learned scaling, dropout, gate, norms), so every configuration and every composition is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import safe_kernels

from ..class_swap import STATE, autocasts, is_hooked, original_type, own_forward
from ..code import own_method, own_methods
from .base import FLOATS, TENSORS, Adapter, register_adapter
from .bottleneck import BottleneckAdapter, refuse_code
from .lora import refuse_tensor
from .observed import Call, ObservedLayer, Sample

_KINDS = {"ReLU": "relu", "SiLU": "silu", "GELUActivation": "gelu", "NewGELUActivation": "gelu_tanh"}
_KINDS |= {"GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_METHODS = own_methods((nn.Module, "__call__"), (nn.Sequential, "forward"), (nn.Linear, "forward"))


def kind_of(layer: Any) -> str | None:
    """Return the activation of `safe_kernels.bottleneck` that an adapter has; None for any other activation."""
    activation = getattr(layer.non_linearity, "f", None)
    if not isinstance(activation, nn.Module) or getattr(activation, "inplace", False) or is_hooked(activation):
        return None
    kind = original_type(activation)
    is_own = kind.__module__ in _HOMES and own_method(kind, "forward") is not None
    return _KINDS.get(kind.__name__) if is_own else None


def refusal(layer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return why the adapter's own code must compute its products, in a few words; None if the op can."""
    if (reason := refuse_code(layer, _METHODS)) is not None:
        return reason
    sequence, up = layer.adapter_down, layer.adapter_up
    down = sequence[-2]
    if type(sequence) is not nn.Sequential or type(down) is not nn.Linear or type(up) is not nn.Linear:
        return f"adapter is made of {type(down).__name__} and {type(up).__name__}, not of nn.Linear"
    if sequence[-1] is not layer.non_linearity or kind_of(layer) is None:
        return f"the activation is none of {', '.join(sorted(set(_KINDS.values())))}"
    if any(map(is_hooked, (sequence, down, up, layer.non_linearity))):
        return "hooks on the layers of the adapter, which the fast path would not run"
    parameters = [module._parameters.get(name) for module in (down, up) for name in ("weight", "bias")]
    if any(type(parameter) not in TENSORS for parameter in parameters):
        return "a weight or bias of the adapter is not an ordinary parameter"
    if len({p.dtype for p in parameters}) > 1 or parameters[0].dtype not in FLOATS:  # type: ignore[union-attr]
        return "the adapter's dtypes differ, or have no kernel"
    return _refuse_input(args[0], parameters[0]) if args else None  # type: ignore[arg-type]


def _refuse_input(x: Any, weight: Tensor) -> str | None:
    if (reason := refuse_tensor(x)) is not None:
        return reason
    return None if x.dtype == weight.dtype or autocasts(x) else "input and adapter differ in dtype"


class _OneOp:
    """An adapter whose own forward calls our op: the layer down returns its input, and the layer up is the op."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer: Any = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def adapter_down(self, x: Tensor) -> Tensor:
        for norm in list(self._layer.adapter_down)[:-2]:
            x = norm(x)
        return x

    def adapter_up(self, x: Tensor) -> Tensor:
        down, up = self._layer.adapter_down[-2], self._layer.adapter_up
        casts = autocasts(x) and up.weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype
        nothing = x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], up.weight.shape[0])
        weights = down.weight, down.bias, up.weight, up.bias
        return safe_kernels.bottleneck(x, nothing, *weights, kind_of(self._layer), 1.0)  # type: ignore[arg-type]


class SafeHubAdapter(ObservedLayer):
    """One adapter of AdapterHub. Its score compares the features without the adapter's output and with it."""

    disable_adapters = merged = False
    name: str

    @property
    def _active_adapter(self) -> str:
        return self.name

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> Any:
        if STATE not in self.__dict__:
            return own_forward(self, x, residual_input, output_gating)
        return self._watch(self._compute, (x, residual_input, output_gating), {})

    def _compute(self, x: Tensor, *args: Any) -> Any:
        seen = self if refusal(self, (x,)) is not None else _OneOp(self)
        return original_type(self).forward(seen, x, *args)

    def _observe(self, due: Mapping[str, Sample], call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        found = call()
        if not self._is_parallel():  # otherwise `post_forward` adds the output
            _score(due, args[1], found[0])
        return found

    def post_forward(self, hidden_states: Tensor, input_hidden_states: Tensor, *args: Any) -> Any:
        """Score an adapter in parallel, whose output is added here."""
        state = self.__dict__.get(STATE)
        if state is not None and state.observe and self.training and self._is_parallel():
            _score(self._due(state, {}), input_hidden_states, (input_hidden_states + hidden_states).detach())
        own: Any = super()
        return own.post_forward(hidden_states, input_hidden_states, *args)

    def _is_parallel(self) -> bool:
        return original_type(self).__name__ == "ParallelAdapter"


def _score(due: Mapping[str, Sample], base: Tensor, output: Tensor) -> None:
    for sample in due.values():
        sample.begin(base)
        sample.end(output)


@register_adapter
class HubAdapter(BottleneckAdapter):
    """One adapter of AdapterHub at one place of the model."""

    layer_type = None  # type: ignore[assignment]  # the package is not imported
    layer_names = ("adapters.methods.modeling.Adapter", "adapters.methods.modeling.ParallelAdapter")
    library = "adapters"
    mixin: ClassVar[type[ObservedLayer]] = SafeHubAdapter
    refusal = staticmethod(refusal)

    @staticmethod
    def keys(layer: Any) -> list[str]:
        return [str(layer.name)]

    @staticmethod
    def parameters_of(layer: Any, key: str) -> list[nn.Parameter]:
        return list(layer.parameters())

    def is_present(self) -> bool:
        return True  # a deleted adapter is no longer called, so it is neither scored nor frozen

    def traits(self) -> dict[str, Any]:
        return {**Adapter.traits(self), "scaling": self.scaling(), "kind": self.kind()}

    def dropouts(self) -> list[nn.Dropout]:
        return [self.layer.dropout]

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.layer.adapter_down[-2].weight, self.layer.adapter_up.weight

    def scaling(self) -> float:
        return float(torch.as_tensor(self.layer.scaling).detach().mean())

    def kind(self) -> str | None:
        return kind_of(self.layer)

    def base_weight(self) -> Tensor:
        return torch.eye(self.layer.input_size, device=self.pair()[0].device)
