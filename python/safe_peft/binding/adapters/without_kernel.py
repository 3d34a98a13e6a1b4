"""Adapters on PEFT's own path: LoRA of embeddings; and IA3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from peft.tuners.ia3.layer import Linear as Ia3Linear
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from safe_kernels import AdapterStatistics

from .base import Adapter, register_adapter
from .lora import LoraAdapter
from .observed import Call, ObservedLayer, Sample, aside, no_kernel
from .score_inputs import OptimizerStep, ScoreInputs


@register_adapter
class LoraEmbeddingAdapter(LoraAdapter):
    """One LoRA adapter of one embedding: a lookup in A, and a small product."""

    layer_type = Embedding
    mixin = ObservedLayer
    refusal = staticmethod(no_kernel)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.layer.lora_embedding_A[self.key], self.layer.lora_embedding_B[self.key]


class BaseRunsApart(ObservedLayer):
    """The base module runs with a changed parameter or input, so its output without the adapter needs another run."""

    def _sample_base(self, due: Mapping[str, Sample], call: Call, args: Any, kwargs: Mapping[str, Any]) -> Any:
        with aside(self, args):
            base = self.base_layer(*args, **kwargs)
        for sample in due.values():
            sample.begin(base)
        return call()


@register_adapter
class Ia3Adapter(Adapter):
    """One IA3 adapter: a vector that scales the input or the output of one linear layer.

    Scores read the vector and its gradient as `lora_A`. There is no product, so `relative_norm` and `drift` give nan.
    PEFT's code retains only what is needed: the scaled tensor while the vector trains, and nothing once it is frozen.
    """

    layer_type: ClassVar[type[nn.Module]] = Ia3Linear
    mixin: ClassVar[type[ObservedLayer]] = BaseRunsApart
    refusal = staticmethod(no_kernel)

    def evidence(self, statistics: AdapterStatistics | None = None) -> ScoreInputs:
        step, vector = OptimizerStep(), self.parameters()[0]
        return ScoreInputs(
            statistics=statistics,
            lora_A=vector.detach(),
            grad_A=lambda: step.grad(vector),
            update_A=lambda: step.update(vector),
            optimizer_state_A=lambda: step.state(vector),
            optimizer=step,
        )
