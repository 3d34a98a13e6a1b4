"""LoRA layers on PEFT's own path: convolutions, embeddings, and single parameters such as the experts of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, ParamWrapper
from torch import Tensor, nn

from .base import dotted_name, register_adapter
from .lora import LoraAdapter
from .observed import Call, ObservedLayer, Sample, aside, no_kernel


class SafeConv(ObservedLayer):
    """The features are the channels of [..., C, *positions]; a row is a position."""

    @property
    def features_dim(self) -> int:  # type: ignore[override]
        return 1 - self.get_base_layer().weight.dim()  # type: ignore[operator]


@register_adapter
class LoraConvAdapter(LoraAdapter):
    """One LoRA adapter of one convolution."""

    layer_type: ClassVar[type[nn.Module]] = Conv1d
    layer_names = (dotted_name(Conv2d), dotted_name(Conv3d))
    mixin: ClassVar[type[ObservedLayer]] = SafeConv
    refusal = staticmethod(no_kernel)

    def matrix_A(self, A: Tensor) -> Tensor:
        """Split lora_A, or lora_B, into one matrix per group of the base layer: each group of B reads one of A."""
        groups = self.layer.get_base_layer().groups
        return A.reshape(groups, A.shape[0] // groups, -1)

    def matrix_B(self, B: Tensor) -> Tensor:
        return self.matrix_A(B)


@register_adapter
class LoraEmbeddingAdapter(LoraAdapter):
    """One LoRA adapter of one embedding: a lookup in A, and a small product."""

    layer_type = Embedding
    mixin = ObservedLayer
    refusal = staticmethod(no_kernel)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.layer.lora_embedding_A[self.key], self.layer.lora_embedding_B[self.key]


class SafeParamWrapper(ObservedLayer):
    """The base module runs with the changed parameter, so its output without the adapter needs a separate run."""

    def _sample_base(self, due: Mapping[str, Sample], call: Call, args: Any, kwargs: Mapping[str, Any]) -> Any:
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
    def refusal(layer: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> str:
        return "lora.ParamWrapper (target_parameters) has no kernel"

    def matrix_A(self, A: Tensor) -> Tensor:
        """Return one matrix per expert."""
        return A.reshape(self.layer.num_experts, -1, A.shape[1])

    def matrix_B(self, B: Tensor) -> Tensor:
        """Return one matrix per expert, from PEFT's order, in which the experts are the last dimension."""
        return B.reshape(B.shape[0], -1, self.layer.num_experts).permute(2, 0, 1)

    def base_weight(self) -> Tensor:
        return self.layer.get_param().detach()
