"""Tiny models of every family in tests/support/families.py and of further ones, for the differential test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import (
    _ATTENTION,
    _BERT,
    _GATED,
    FAMILIES,
    HEADS,
    SIZES,
    TOKENS,
    VOCABULARY,
    D,
    F,
    Family,
    _causal,
    _classes,
    _configured,
    _llama_like,
)
from torch import Tensor, nn


def _config(config: str, model: str, **options: Any) -> Callable[[int, float], nn.Module]:
    def make(layers: int, p: float) -> nn.Module:
        return _configured(getattr(hf, config), getattr(hf, model), **TOKENS | options)(layers, p)

    return make


def _audio() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    return {"input_features": torch.randn(2, 8, 32, generator=generator), "labels": labels}


_TEXT = {**SIZES, "max_position_embeddings": 64}
_TWICE = {
    "vocab_size": VOCABULARY,
    "d_model": D,
    "encoder_layers": "layers",
    "decoder_layers": "layers",
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "dropout": "dropout",
    "decoder_start_token_id": 1,
}
_OPT_SIZES = {name: value for name, value in _TEXT.items() if name != "intermediate_size"} | {"ffn_dim": F}
_OPT_SIZES |= {"word_embed_proj_dim": D, "dropout": "dropout", "attention_dropout": 0.0}
_OPT = _config("OPTConfig", "OPTForCausalLM", **_OPT_SIZES)
_NEOX = _config("GPTNeoXConfig", "GPTNeoXForCausalLM", **_TEXT, hidden_dropout="dropout")
_FALCON_SIZES = {name: value for name, value in _TEXT.items() if name != "intermediate_size"} | {"ffn_hidden_size": F}
_FALCON = _config("FalconConfig", "FalconForCausalLM", **_FALCON_SIZES, hidden_dropout="dropout")
_POSITIONS = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
_WHISPER = _config(
    "WhisperConfig",
    "WhisperForConditionalGeneration",
    **_TWICE | _POSITIONS | {"suppress_tokens": None, "begin_suppress_tokens": None},
)
_BART = _config(
    "BartConfig",
    "BartForConditionalGeneration",
    **_TWICE | {"max_position_embeddings": 64, "forced_eos_token_id": None},
)
_RELATIVE = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
_RELATIVE |= {"norm_rel_ebd": "layer_norm", "share_att_key": True, "max_position_embeddings": 40}
_DROPOUTS = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": 0.0}
_DEBERTA = _config("DebertaV2Config", "DebertaV2ForSequenceClassification", **_TEXT | _RELATIVE | _DROPOUTS)
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": D // HEADS}
_GEMMA = {"head_dim": D // HEADS, "query_pre_attn_scalar": D // HEADS, "sliding_window": 8}
_FC = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def _decoder(name: str, config: str, model: str, targets: tuple[str, ...] = _GATED, **extra: Any) -> list[Family]:
    found = getattr(hf, config, None), getattr(hf, model, None)
    return [] if None in found else [Family(name, _llama_like(*found, **extra), targets, _causal)]


MORE = (
    *_decoder("gemma2", "Gemma2Config", "Gemma2ForCausalLM", **_GEMMA),
    *_decoder("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", **_GEMMA),
    *_decoder("mixtral", "MixtralConfig", "MixtralForCausalLM", _ATTENTION, **_MOE),
    *_decoder("qwen3-moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM", _ATTENTION, **_QWEN_MOE),
    *_decoder("olmo2", "Olmo2Config", "Olmo2ForCausalLM"),
    *_decoder("cohere", "CohereConfig", "CohereForCausalLM"),
    *_decoder("granite", "GraniteConfig", "GraniteForCausalLM"),
    *_decoder("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM", (*_ATTENTION, "c_fc", "c_proj")),
    Family("opt", _OPT, _FC, _causal),
    Family("gpt-neox", _NEOX, ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"), _causal),
    Family("falcon", _FALCON, ("query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"), _causal),
    Family("whisper", _WHISPER, _FC, _audio),
    Family("bart", _BART, _FC, lambda: {**_causal()}),
    Family(
        "deberta",
        _DEBERTA,
        ("query_proj", "key_proj", "value_proj", "attention.output.dense", *_BERT[-2:]),
        _classes,
    ),
)
EVERY = {one.name: one for one in (*FAMILIES, *MORE)}
MOE = {"mixtral", "qwen3-moe"}
"""Families with router logits."""
ENCODERS = {"bert", "roberta", "mpnet", "distilbert", "vit", "deberta"}
TWO_STACKS = {"t5", "t5-gated", "whisper", "bart"}
NO_TOKENS = {"vit", "whisper"}
"""Whose input is no sequence of tokens that could be padded or embedded."""
DECODERS = set(EVERY) - ENCODERS - TWO_STACKS
