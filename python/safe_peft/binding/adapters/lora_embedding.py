"""LoRA on nn.Embedding: PEFT's `lora.Embedding`, on PEFT's own path."""

from __future__ import annotations

from peft.tuners.lora.layer import Embedding as PeftEmbedding
from torch import Tensor

from .base import register_adapter
from .lora import LoraAdapter
from .observed import ObservedLayer, no_kernel


@register_adapter
class LoraEmbeddingAdapter(LoraAdapter):
    """One LoRA adapter of one embedding: a lookup in A, and a small product."""

    layer_type = PeftEmbedding
    mixin = ObservedLayer
    refusal = staticmethod(no_kernel)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the adapter's two parameters."""
        return self.layer.lora_embedding_A[self.key], self.layer.lora_embedding_B[self.key]
