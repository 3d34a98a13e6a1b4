"""LoRA on convolutions: PEFT's `lora.Conv1d`, `Conv2d` and `Conv3d`, on PEFT's own path. Their rows are positions."""

from __future__ import annotations

from typing import ClassVar

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import Tensor, nn

from .base import register_adapter
from .lora import LoraAdapter
from .observed import Observed, no_kernel


class SafeConv1d(Observed):
    """Features lie along the channels: [..., C, L]."""

    features_dim = -2


class SafeConv2d(Observed):
    """Features lie along the channels: [..., C, H, W]."""

    features_dim = -3


class SafeConv3d(Observed):
    """Features lie along the channels: [..., C, D, H, W]."""

    features_dim = -4


@register_adapter
class LoraConv1dAdapter(LoraAdapter):
    """One LoRA adapter of one Conv1d."""

    layer_type: ClassVar[type[nn.Module]] = Conv1d
    mixin: ClassVar[type[Observed]] = SafeConv1d
    refusal = staticmethod(no_kernel)

    def matrix_A(self, A: Tensor) -> Tensor:
        """Cut into as many pieces as the base layer has groups: B reads each with a group of its own."""
        groups = self.layer.get_base_layer().groups
        return A.reshape(groups, A.shape[0] // groups, -1)

    def matrix_B(self, B: Tensor) -> Tensor:
        """One matrix a group."""
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
