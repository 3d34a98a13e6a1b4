"""LoRA on convolutions: PEFT's `lora.Conv1d`, `Conv2d` and `Conv3d`, on PEFT's own path. A row is a position."""

from __future__ import annotations

from typing import ClassVar

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import Tensor, nn

from .base import register_adapter
from .lora import LoraAdapter
from .observed import ObservedLayer, no_kernel


class SafeConv1d(ObservedLayer):
    """The features are the channels of [..., C, L]."""

    features_dim = -2


class SafeConv2d(ObservedLayer):
    """The features are the channels of [..., C, H, W]."""

    features_dim = -3


class SafeConv3d(ObservedLayer):
    """The features are the channels of [..., C, D, H, W]."""

    features_dim = -4


@register_adapter
class LoraConv1dAdapter(LoraAdapter):
    """One LoRA adapter of one Conv1d."""

    layer_type: ClassVar[type[nn.Module]] = Conv1d
    mixin: ClassVar[type[ObservedLayer]] = SafeConv1d
    refusal = staticmethod(no_kernel)

    def matrix_A(self, A: Tensor) -> Tensor:
        """Split lora_A into one matrix per group of the base layer: each group of lora_B reads one of them."""
        groups = self.layer.get_base_layer().groups
        return A.reshape(groups, A.shape[0] // groups, -1)

    def matrix_B(self, B: Tensor) -> Tensor:
        """Return one matrix per group of the base layer."""
        groups = self.layer.get_base_layer().groups
        return B.reshape(groups, B.shape[0] // groups, -1)


@register_adapter
class LoraConv2dAdapter(LoraConv1dAdapter):
    """One LoRA adapter of one Conv2d."""

    layer_type = Conv2d
    mixin = SafeConv2d


@register_adapter
class LoraConv3dAdapter(LoraConv1dAdapter):
    """One LoRA adapter of one Conv3d."""

    layer_type = Conv3d
    mixin = SafeConv3d
