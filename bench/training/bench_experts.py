"""A training step with LoRA on the parameters of all experts, ours compared with stock PEFT.

Random weights: 2 blocks, d 256, 2 x 256 tokens, r 8 on experts and attention, transformers' grouped matrix products.
*frozen* means that the adapters of the experts are frozen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from minilm import Step
from peft import LoraConfig, get_peft_model
from pytest_benchmark.fixture import BenchmarkFixture
from step_pairs import compare_with_stock

SIZES = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral, 8 experts of 896, 2 per token": (
        "Mixtral",
        {"intermediate_size": 896, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "Qwen3-MoE, 64 experts of 96, 8 per token": (
        "Qwen3Moe",
        {"moe_intermediate_size": 96, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "GPT-OSS, 32 experts of 256, 4 per token": (
        "GptOss",
        {"intermediate_size": 256, "num_local_experts": 32, "num_experts_per_tok": 4},
    ),
}


def make_step(shape: str, frozen: bool) -> Step:
    """The step, and its experts' adapters frozen as stock PEFT can: by requires_grad."""
    torch.manual_seed(0)
    name, more = MOE[shape]
    config = getattr(hf, f"{name}Config")(**SIZES | more, num_key_value_heads=2, use_cache=False)
    base = getattr(hf, f"{name}ForCausalLM")(config)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(base, lora).train()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "experts" in path:  # transformers leaves the biases empty, and B is zero
                parameter.normal_(std=0.02)
            parameter.requires_grad_(parameter.requires_grad and not (frozen and "experts" in path))
    ids = torch.randint(3, 1000, (2, 256), generator=torch.Generator().manual_seed(0))
    return Step(model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("provider", ["peft", "safe"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("shape", MOE)
def test_experts_step(benchmark: BenchmarkFixture, shape: str, frozen: bool, provider: str) -> None:
    compare_with_stock(benchmark, lambda: make_step(shape, frozen), provider, same_loss=True)
