"""Small mixtures of experts with LoRA on the experts' parameters, in PEFT's `target_parameters`."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from recomputed import EXPERTS
from releases import TRANSFORMERS_4
from tiny import VOCABULARY, randomise_adapters
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
_SIZES = {**EXPERTS, "num_hidden_layers": 2, "num_experts_per_tok": 2, "use_cache": False}
_QWEN = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16}
STACKED = not TRANSFORMERS_4
"""Before, transformers had a list of MLPs for most models' experts, and GPT-OSS's experts reshaped their input."""
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}),
    "qwen3-moe": ("Qwen3Moe", _QWEN),
    "gpt-oss": ("GptOss", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
}
SHAPES = {name: shape for name, shape in _SHAPES.items() if STACKED or name == "gpt-oss"}


def language_model(shape: str, implementation: str = "grouped_mm", **lora: Any) -> PeftModel:
    """A causal model with adapters on its experts only; nothing else trains."""
    torch.manual_seed(0)
    name, more = SHAPES[shape]
    config = getattr(hf, f"{name}Config")(**_SIZES | more)
    config._experts_implementation = implementation
    model: nn.Module = getattr(hf, f"{name}ForCausalLM")(config)
    return adapted(model, **{"target_parameters": PARAMETERS} | lora)


def adapted(model: nn.Module, **lora: Any) -> PeftModel:
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves the experts' biases empty
            parameter.normal_(std=0.1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": []} | lora
    adapted = get_peft_model(model, LoraConfig(**options))
    randomise_adapters(adapted)
    return adapted.train()


class Experts(nn.Module):
    """Gives every token to the expert its place says, one expert after the other as transformers' "eager" does."""

    def __init__(self, count: int, d: int, f: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(count, d, f))
        self.down = nn.Parameter(torch.empty(count, f, d))
        self.single = nn.Parameter(torch.empty(d, d))
        self.factor = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        count = len(self.up)
        up = self.up if self.factor == 1.0 else self.up.mul_(self.factor)
        parts = [(hidden[..., e::count, :] @ up[e]).relu() @ self.down[e] for e in range(count)]
        return torch.stack(parts, -2).flatten(-3, -2) @ self.single


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.experts = Experts(2, 16, 24)
        self.score = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        hidden = self.first(self.words(input_ids))
        hidden = self.second(hidden + self.experts(hidden)).relu()
        logits = self.score((hidden * attention_mask[..., None]).mean(1))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def mixture(**lora: Any) -> PeftModel:
    """A classifier with adapters on its linear layers and on both stacks of its experts' weights."""
    torch.manual_seed(0)
    options = {"target_modules": ["first", "second"], "target_parameters": ["experts.up", "experts.down"]}
    return adapted(Mixture(), **options | lora)
