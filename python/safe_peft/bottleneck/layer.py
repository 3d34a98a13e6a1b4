"""A linear layer with bottleneck adapters on its output."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .config import KINDS, BottleneckConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
NO_MERGE = (
    "a bottleneck adapter cannot be merged: its activation is not linear, so no weight of the layer computes the same. "
    "Keep the adapter, or remove it with unload()."
)


class Input:
    """A forward pre-hook on the first layer of an MLP: it keeps the MLP's input until the last layer has run."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.value = args[0]

    def take(self) -> Tensor | None:
        """Return the input, and keep it no longer."""
        value, self.value = self.value, None
        return value


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer with bottleneck adapters on its output; each is a small MLP that is added to the output.

    Args:
        base_layer: the linear layer.
        adapter_name: PEFT's name of the first adapter.
        config: the first adapter's options.
        first: for placement "parallel", the layer whose input the adapter reads; None for the base layer itself.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "kind", "scaling", "parallel")
    base_layer: nn.Module
    bottleneck_down: nn.ModuleDict
    bottleneck_up: nn.ModuleDict
    bottleneck_dropout: nn.ModuleDict
    _move_adapter_to_device_of_base_layer: Any
    set_adapter: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, first: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.kind: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.parallel: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = widths(base_layer)
        self._input: Input | None = None
        self.update_layer(adapter_name, config, first)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, first: nn.Module | None = None) -> None:
        """Add an adapter."""
        is_parallel = config.placement == "parallel"
        if is_parallel and self._input is None:
            self._input = Input()
            self._hook = (self.base_layer if first is None else first).register_forward_pre_hook(self._input)
            self.read_features = widths(self.base_layer if first is None else first)[0]
        d_in, d_out = self.read_features if is_parallel else self.out_features, self.out_features
        r = max(1, math.floor(d_out / config.reduction_factor))
        down, up = nn.Linear(d_in, r), nn.Linear(r, d_out)
        if config.init_weights:
            for parameter in (down.bias, up.weight, up.bias):
                nn.init.zeros_(parameter)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.kind[adapter_name] = KINDS[config.non_linearity]
        self.scaling[adapter_name], self.parallel[adapter_name] = config.scaling, is_parallel
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer and its active adapters, one after the other."""
        out, inner = self.outputs(x, *args, **kwargs)
        active: list[str] = [] if self.disable_adapters else self.active_adapters  # type: ignore[assignment]
        for key in active:
            if key in self.bottleneck_down:
                out = self._add(key, inner if self.parallel[key] else out, out)
        return out

    def outputs(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the base layer's output, and the input of an adapter in parallel, or None."""
        out: Tensor = self.base_layer(x, *args, **kwargs)
        return out, None if self._input is None else self._input.take()

    def _add(self, key: str, x: Tensor, out: Tensor) -> Tensor:
        down, up = self.bottleneck_down[key], self.bottleneck_up[key]
        h = ACTIVATIONS[self.kind[key]](down(self._cast_input_dtype(x, down.weight.dtype)))  # type: ignore[operator]
        return (out + self.scaling[key] * up(self.bottleneck_dropout[key](h))).to(out.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Do nothing, because nothing is ever merged."""

    def close(self) -> None:
        """Remove the hook on the MLP's first layer, if there is one."""
        if self._input is not None:
            self._hook.remove()


def widths(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output features of a linear layer; GPT-2's Conv1D names them nx and nf.

    Raises:
        ValueError: The module is not a linear layer.
    """
    for d_in, d_out in (("in_features", "out_features"), ("nx", "nf")):
        if hasattr(layer, d_in) and hasattr(layer, d_out):
            return getattr(layer, d_in), getattr(layer, d_out)
    raise ValueError(f"a bottleneck adapter needs a linear layer, got {type(layer).__name__}; change target_modules.")


def is_linear(layer: nn.Module) -> bool:
    """Whether `widths` supports the layer."""
    return hasattr(layer, "out_features") or hasattr(layer, "nf")
