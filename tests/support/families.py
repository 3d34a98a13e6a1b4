"""One small model of every family whose blocks are bound, with LoRA on all of its linear layers, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import randomise_adapters
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

VOCABULARY, ROWS, LENGTH = 61, 2, 16
HEADS, D, F = 2, 32, 48


@dataclass(frozen=True)
class Family:
    """How to make a model of `layers` blocks with dropout `p` in the model itself."""

    name: str
    make: Callable[[int, float], nn.Module]
    targets: tuple[str, ...] | str
    batch: Callable[[], dict[str, Tensor]]

    def __str__(self) -> str:
        return self.name

    def model(
        self,
        layers: int = 2,
        p: float = 0.0,
        lora_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        **lora: Any,
    ) -> PeftModel:
        """With adapters that do something, in training mode, the same every time."""
        torch.manual_seed(0)
        base = self.make(layers, p)
        targets = list(self.targets) if isinstance(self.targets, tuple) else self.targets
        conv1d = {"fan_in_fan_out": True} if self.name == "gpt2" else {}
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=lora_dropout, target_modules=targets, **conv1d, **lora)
        model = get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype).train()
        randomise_adapters(model)
        _vary_norms(model)
        return model


def _vary_norms(model: nn.Module) -> None:
    """Trained norms have other weights than ones and other biases than zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters(recurse=False):
                    parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def _text() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _causal() -> dict[str, Tensor]:
    batch = _text()
    return {**batch, "labels": batch["input_ids"]}


def _classes() -> dict[str, Tensor]:
    return {**_text(), "labels": torch.tensor([0, 1])}


def _pixels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 1])}


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": "layers",
    "num_attention_heads": HEADS,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {**SIZES, **TOKENS, "num_key_value_heads": HEADS, "max_position_embeddings": 64, "use_cache": False}
_ENCODER = {**SIZES, "max_position_embeddings": 40, "hidden_dropout_prob": "dropout"}
_ENCODER |= {"attention_probs_dropout_prob": 0.0}


def _configured(config: type, model: type, **options: Any) -> Callable[[int, float], nn.Module]:
    """Options whose value is "layers" or "dropout" are the depth and the model's own dropout."""

    def make(layers: int, p: float) -> nn.Module:
        told = {"layers": layers, "dropout": p}
        return model(config(**{name: told.get(str(value), value) for name, value in options.items()}))

    return make


def _llama_like(config: type, model: type, **extra: Any) -> Callable[[int, float], nn.Module]:
    return _configured(config, model, **_DECODER | extra)


def _bert_like(config: type, model: type, **extra: Any) -> Callable[[int, float], nn.Module]:
    return _configured(config, model, **_ENCODER | extra)


_distilbert = _configured(
    hf.DistilBertConfig,
    hf.DistilBertForSequenceClassification,
    **{"vocab_size": VOCABULARY, "dim": D, "hidden_dim": F, "n_layers": "layers", "n_heads": HEADS},
    **{"max_position_embeddings": 40, "attention_dropout": 0.0, "dropout": "dropout", "seq_classif_dropout": "dropout"},
)
_gpt2 = _configured(
    hf.GPT2Config,
    hf.GPT2LMHeadModel,
    **{"vocab_size": VOCABULARY, "n_positions": 40, "n_embd": D, "n_layer": "layers", "n_head": HEADS, "n_inner": F},
    **{"resid_pdrop": "dropout", "embd_pdrop": "dropout", "attn_pdrop": 0.0, "use_cache": False},
)


def _t5(feed_forward: str) -> Callable[[int, float], nn.Module]:
    def make(layers: int, p: float) -> nn.Module:
        sizes = {"vocab_size": VOCABULARY, "d_model": D, "d_kv": D // HEADS, "d_ff": F, "num_layers": layers}
        config = hf.T5Config(**sizes, num_heads=HEADS, dropout_rate=p, feed_forward_proj=feed_forward, use_cache=False)
        config.decoder_start_token_id = 0
        model = hf.T5ForConditionalGeneration(config)
        for module in model.modules():  # no attention dropout: one rate serves all of T5's dropouts
            if type(module).__name__ == "T5Attention":
                module.dropout = 0.0
        return model

    return make


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_CAUSAL = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": D // HEADS}),
    "gemma": (hf.GemmaConfig, hf.GemmaForCausalLM, {"head_dim": D // HEADS, "hidden_act": "gelu_pytorch_tanh"}),
    "smollm": (hf.LlamaConfig, hf.LlamaForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}

FAMILIES = (
    *(Family(name, _llama_like(c, m, **extra), _GATED, _causal) for name, (c, m, extra) in _CAUSAL.items()),
    Family(
        "phi3",
        _llama_like(hf.Phi3Config, hf.Phi3ForCausalLM),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        _causal,
    ),
    Family("bert", _bert_like(hf.BertConfig, hf.BertForSequenceClassification), _BERT, _classes),
    Family("roberta", _bert_like(hf.RobertaConfig, hf.RobertaForSequenceClassification), _BERT, _classes),
    Family(
        "mpnet",
        _bert_like(hf.MPNetConfig, hf.MPNetForSequenceClassification),
        ("attn.q", "attn.k", "attn.v", "attn.o", "intermediate.dense", "output.dense"),
        _classes,
    ),
    Family("distilbert", _distilbert, ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"), _classes),
    Family("gpt2", _gpt2, ("c_attn", "c_proj", "c_fc"), _causal),
    Family(
        "vit",
        _bert_like(hf.ViTConfig, hf.ViTForImageClassification, image_size=8, patch_size=2),
        (*_ATTENTION, "fc1", "fc2", *_BERT),  # transformers 4 names them as BERT's
        _pixels,
    ),
    Family("t5", _t5("relu"), ("q", "k", "v", "o", "wi", "wo"), lambda: {**_text(), "labels": _text()["input_ids"]}),
    Family(
        "t5-gated",
        _t5("gated-gelu"),
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        lambda: {**_text(), "labels": _text()["input_ids"]},
    ),
)


def family(name: str) -> Family:
    """One by name."""
    return next(one for one in FAMILIES if one.name == name)


def attention_unknown(dtype: torch.dtype) -> int:
    """Bytes that PyTorch's attention keeps and its own fake one does not: none, but in float64 before torch 2.13."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    real = torch.zeros(ROWS, HEADS, LENGTH, D // HEADS, dtype=dtype)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(real)
        known = attend(fake, fake, fake)[1].nbytes
    return attend(real, real, real)[1].nbytes - known
