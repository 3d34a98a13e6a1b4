"""A model for every way to set LoRA and bottleneck adapters up, and what `explain` says of its layers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import peft
import torch
from adapted import adapted_bert
from families import family
from odd import odd
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from tiny import BERT_TARGETS, batches, bert, causal_batches, gpt2, randomise_adapters
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safe_peft.bottleneck.config import PLACEMENTS

FAST = ""


@dataclass(frozen=True)
class Option:
    """One way to set LoRA up.

    Args:
        name: for the test's name.
        make: the model; the same every time.
        data: gives batches for it.
        reasons: why its layers take PEFT's path; "" for those that do not.
    """

    name: str
    make: Callable[[], PeftModel]
    data: Callable[[int], Any] = batches
    reasons: frozenset[str] = frozenset({FAST})

    def __str__(self) -> str:
        return self.name


def with_random(model: PeftModel) -> PeftModel:
    randomise_adapters(model)
    return model


def bert_with(name: str, *reasons: str, **lora: Any) -> Option:
    return Option(name, lambda: bert(**copy.deepcopy(lora)), reasons=frozenset(reasons or {FAST}))


def eva() -> PeftModel:
    config = peft.EvaConfig(rho=1.0)
    model = bert(init_lora_weights="eva", eva_config=config)
    data = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches(4)]
    model.eval()
    peft.initialize_lora_eva_weights(model, data)
    return model.train()


def corda() -> PeftModel:
    base = bert().unload()
    options: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 4, "target_modules": BERT_TARGETS}
    config = LoraConfig(**options, init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig())

    @torch.no_grad()
    def run() -> None:
        for batch in batches(6, rows=1):  # PEFT's hook takes one row at a time
            base.eval()(**batch)

    # PEFT's file takes a decorator from the package attrs, which PEFT does not require; the standard one does as well.
    with patch.dict(sys.modules, {"attr": dataclasses}):
        importlib.import_module("peft.tuners.lora.corda").preprocess_corda(base, config, run_model=run)
    return get_peft_model(base, config).train()


def tied() -> PeftModel:
    return with_random(gpt2(target_modules=["c_attn", "wte"], ensure_weight_tying=True))


def replicated() -> PeftModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, use_cache=False))
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [0, 2]])
    return with_random(get_peft_model(base, config).train())


def smollm(count: int) -> list[dict[str, Tensor]]:
    return [family("smollm").batch()] * count


NO_KERNEL = "lora.Embedding has no kernel"
PARAMETERS = "lora.ParamWrapper (target_parameters) has no kernel" + (
    "; backward makes the changed weight again"
    if hasattr(ParamWrapper, "get_delta_factors")
    else " and retains the changed weight: this version of PEFT adds the product of A and B as one tensor"
)
TOKENS = "trainable_tokens.TrainableTokensLayer is not covered"
OPTIONS = (
    bert_with("bias-all", bias="all"),
    bert_with("bias-lora_only", bias="lora_only"),
    bert_with("lora_bias", lora_bias=True),
    bert_with("rank_pattern", rank_pattern={"query": 2, "layer.1.*key": 6}, alpha_pattern={"value": 3}),
    bert_with("rslora", use_rslora=True),
    *(
        bert_with(start, init_lora_weights=start)
        for start in ("pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian")
    ),
    Option("eva", eva),
    Option("corda", corda),
    bert_with("dora", use_dora=True),
    bert_with("dora-embedding", FAST, NO_KERNEL, use_dora=True, target_modules=["query", "word_embeddings"]),
    bert_with("embedding", FAST, NO_KERNEL, target_modules=["query", "word_embeddings"]),
    bert_with("trainable_token_indices", FAST, TOKENS, trainable_token_indices={"word_embeddings": [3, 7]}),
    bert_with("layers_to_transform", layers_to_transform=[1], layers_pattern="layer", target_modules=["query", "key"]),
    bert_with("exclude_modules", exclude_modules=["bert.encoder.layer.0.attention.self.query"]),
    bert_with("modules_to_save", modules_to_save=["classifier", "LayerNorm"]),
    bert_with("all-linear", target_modules="all-linear"),
    Option(
        "convolutions-and-parameters",
        odd,
        reasons=frozenset({FAST, NO_KERNEL, PARAMETERS}),
    ),
    Option("tied", tied, causal_batches, frozenset({FAST, NO_KERNEL})),
    Option("layer_replication", replicated, causal_batches),
    Option("tied-head", lambda: family("smollm").model(), smollm),
    *(Option(f"bottleneck-{place}", partial(adapted_bert, layers=3, placement=place)) for place in PLACEMENTS),
)
