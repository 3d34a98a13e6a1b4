"""Llama shapes with random weights, and training steps with PEFT, ours, Liger and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    },
}
"""Llama 3.2 1B and Llama 3.1 8B, from their public configurations, and a tiny one for a dry run."""
TOKENS = {"1B": (4, 2048), "8B": (2, 2048), "tiny": (2, 16)}
"""Samples per batch, and tokens per sample."""
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LAYOUTS: dict[str, Callable[[int, int], bool]] = {
    "nothing": lambda layer, layers: False,
    "lower half": lambda layer, layers: layer < layers // 2,
    "every other": lambda layer, layers: layer % 2 == 0,
    "lower three quarters": lambda layer, layers: layer < 3 * layers // 4,
    "three of four": lambda layer, layers: layer % 4 != 3,
}
"""The blocks whose adapters are frozen."""
CHUNK = 1024
LOSS = {
    "liger, and Liger's loss": "Liger's linear layer and cross entropy in one, without whole logits",
    "chunked loss": f"the same cross entropy of {CHUNK} tokens at a time, each chunk run again in backward",
    "all others": "transformers' cross entropy of whole logits, in float32",
}
"""By provider; with such a vocabulary whole logits are a large part of the peak."""


def make_model(shape: dict[str, Any], device: torch.device, single: bool) -> nn.Module:
    """Random weights, bf16, an adapter on every linear layer: in bf16, or in float32 as PEFT does by default."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, use_cache=False)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return get_peft_model(model, LoraConfig(**LORA), autocast_adapter_dtype=single).train()


def freeze(model: nn.Module, layout: str) -> None:
    """Freezes whole blocks' adapters, as the schedule does, their dropout off."""
    blocks = model.get_submodule("base_model.model.model.layers")
    for index, block in enumerate(blocks):
        if not LAYOUTS[layout](index, len(blocks)):
            continue
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" not in name)
        for module in block.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


@contextmanager
def liger(model: nn.Module, loss_alone: bool) -> Iterator[None]:
    """Liger's kernels, or its loss alone. It changes transformers' own module, which others use after it."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    parts = {"rope": False, "rms_norm": False, "swiglu": False} if loss_alone else {}
    try:
        apply_liger_kernel_to_llama(model=model.get_submodule("base_model.model"), **parts)
        yield
    finally:
        vars(modeling_llama).update(before)


def whole_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's own."""
    return model(input_ids=tokens, labels=tokens).loss


def chunked_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same number, by PyTorch alone, without the logits of all tokens at once."""
    inner: Any = model.get_submodule("base_model.model")
    hidden = inner.model(input_ids=tokens).last_hidden_state[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(inner.lm_head(hidden).float(), targets, reduction="sum")

    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks) / len(targets)


class Step:
    """Forward, backward, optimizer; scored, if there is a freezer."""

    def __init__(self, model: nn.Module, tokens: Tensor, scored: bool = False, chunked: bool = False) -> None:
        self.model, self.tokens, self.freezer = model, tokens, None
        self.loss = chunked_loss if chunked else whole_loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        if scored:
            import safe_peft

            always = safe_peft.SafeConfig(target_fraction=0.0, score_interval=1)
            self.freezer = safe_peft.AdapterFreezer(model, self.optimizer, always, total_steps=10**6)

    def __call__(self) -> None:
        self.loss(self.model, self.tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.freezer is not None:
            self.freezer.step()
