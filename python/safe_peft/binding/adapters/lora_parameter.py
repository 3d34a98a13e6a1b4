"""LoRA on a single parameter, such as the experts of a mixture: PEFT's `lora.ParamWrapper`, on PEFT's own path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from .base import register_adapter
from .lora import LoraAdapter
from .observed import Call, ObservedLayer, Sample, aside


class SafeParamWrapper(ObservedLayer):
    """The base module runs with the changed parameter, so its output without the adapter needs a separate run."""

    def _sample_base(
        self, due: Mapping[str, Sample], call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        with aside(self, args):
            base = self.base_layer(*args, **kwargs)
        for sample in due.values():
            sample.begin(base)
        return call()


@register_adapter
class LoraParameterAdapter(LoraAdapter):
    """One LoRA adapter of one parameter, a matrix or a stack of them."""

    layer_type = ParamWrapper
    mixin = SafeParamWrapper

    @staticmethod
    def refusal(layer: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str:
        """Return why the layer takes PEFT's path."""
        return "lora.ParamWrapper (target_parameters) has no kernel"

    def matrix_A(self, A: Tensor) -> Tensor:
        """Return one matrix per expert."""
        return A.reshape(self.layer.num_experts, -1, A.shape[1])

    def matrix_B(self, B: Tensor) -> Tensor:
        """Return one matrix per expert, from PEFT's order, in which the experts are the last dimension."""
        return B.reshape(B.shape[0], -1, self.layer.num_experts).permute(2, 0, 1)

    def base_weight(self) -> Tensor:
        """Return the parameter itself."""
        weight: Tensor = self.layer.get_param()
        return weight.detach()
