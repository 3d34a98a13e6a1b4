"""Models of the usual shapes with random weights: 8 layers, d 512, 1,024 tokens, LoRA r 16 on every linear layer.

Attention goes through SDPA, without dropout of its own; `p` is the dropout of the adapters and, where the family has
any, of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

LAYERS, D, HEADS, ROWS, LENGTH, VOCABULARY = 8, 512, 8, 4, 256, 1000
TOKENS = ROWS * LENGTH


def _llama(p: float) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config)


def _bert_like(config: type, model: type, **extra: Any) -> Callable[[float], nn.Module]:
    def make(p: float) -> nn.Module:
        options = {
            "hidden_size": D,
            "intermediate_size": 4 * D,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_dropout_prob": p,
            "attention_probs_dropout_prob": 0.0,
        }
        return model(config(**options | extra))

    return make


def _gpt2(p: float) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=D,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    return hf.GPT2LMHeadModel(config)


_TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH + 2}
_BERT = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODELS: dict[str, tuple[Callable[[float], nn.Module], list[str]]] = {
    "llama": (_llama, [*_ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "bert": (_bert_like(hf.BertConfig, hf.BertForSequenceClassification, **_TEXT), _BERT),
    "gpt2": (_gpt2, ["c_attn", "c_proj", "c_fc"]),
    "mpnet": (
        _bert_like(hf.MPNetConfig, hf.MPNetForSequenceClassification, **_TEXT),
        ["attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"],
    ),
    "vit": (
        _bert_like(hf.ViTConfig, hf.ViTForImageClassification, image_size=128, patch_size=8, num_channels=1),
        [*_ATTENTION, "fc1", "fc2"],
    ),
}
FROZEN = ("nothing", "lower half", "every other block")


def make_model(shape: str, p: float, frozen: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In training mode, adapters of the named blocks frozen as stock PEFT can: by requires_grad."""
    torch.manual_seed(0)
    make, targets = MODELS[shape]
    conv1d = {"fan_in_fan_out": True} if shape == "gpt2" else {}
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules=targets, **conv1d)
    model = get_peft_model(make(p), lora, autocast_adapter_dtype=False).to(dtype).train()
    for name, layer in adapter_layers(model):
        index = next(int(part) for part in name.split(".") if part.isdigit())
        if {"nothing": False, "lower half": index < LAYERS // 2, "every other block": index % 2 == 0}[frozen]:
            layer.lora_A.requires_grad_(False)
            layer.lora_B.requires_grad_(False)
    return model


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Paths and layers, lowest first."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


def switch_off_frozen_dropout(model: nn.Module) -> None:
    """Turn off the dropout of frozen adapters, as the freezer does."""
    for _, layer in adapter_layers(model):
        if not next(layer.lora_A.parameters()).requires_grad:
            for dropout in layer.lora_dropout.values():
                dropout.p = 0.0


def make_batch(shape: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tokens or pixels, no padding."""
    generator = torch.Generator().manual_seed(0)
    if shape == "vit":
        pixels = torch.randn(4, 1, 128, 128, generator=generator, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(4, dtype=torch.int64)}
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels = ids if shape in ("llama", "gpt2") else torch.zeros(ROWS, dtype=torch.int64)
    return {"input_ids": ids, "labels": labels}
