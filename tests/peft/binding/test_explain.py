from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import adamw, batches, bert, gpt2, train
from torch import nn
from transformers import (
    BertForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from safe_kernels.triton.runtime import launch_replay
from safe_peft import AdapterFreezer, SafeConfig, bind, explain


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 16)
        self.mix = nn.Linear(16, 16)
        self.stretch = nn.Conv1d(16, 16, 1)


def test_an_unbound_model_is_told_what_binding_would_do() -> None:
    explanation = explain(bert())
    assert len(explanation) == 12
    for row in explanation:
        assert (row.kind, row.path, row.trainable, row.frozen) == ("lora.Linear", "peft", True, False)
        assert row.reason == "not bound: bind(model) puts it on safe_kernels::lora"


def test_a_bound_model_takes_the_fast_path_and_needs_no_reason() -> None:
    model = gpt2()
    with bind(model):
        assert {(row.path, row.reason) for row in explain(model)} == {("safe_kernels::lora", "")}
        assert "8 adapter layers: 8 by safe_kernels::lora" in str(explain(model))
    assert {row.path for row in explain(model)} == {"peft"}


def test_a_summary_counts_and_details_list() -> None:
    model = gpt2()
    with bind(model):
        model.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].register_forward_hook(lambda *_: None)
        explanation = explain(model)
        lines = str(explanation).splitlines()
        assert lines[0] == "8 adapter layers: 7 by safe_kernels::lora, 1 by peft"
        assert lines[1] == "     1  peft: hooks on lora_A, lora_B or lora_dropout, which the fast path would not run"
        assert lines[2] == "     8  trainable"
        assert "     2  trains" in lines and lines[-1] == "details() lists every layer, part and block"
        assert len(lines) < 16 and not any("transformer.h.1" in line for line in lines)
        for name in [*(row.name for row in explanation), *(part.name for part in explanation.parts)]:
            assert name in explanation.details()
        assert all(name in explanation.details() for name in explanation.blocks)


def llava() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=20), image_token_index=3)
    config.text_config.use_cache = True
    return get_peft_model(LlavaForConditionalGeneration(config), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "path"), [(gpt2, "model.config"), (llava, "model.config.text_config")], ids=["gpt2", "llava"]
)
def test_a_cache_that_is_kept_in_training_is_noted(make: Callable[[], Any], path: str) -> None:
    model = make().train()
    config = model.config if path == "model.config" else model.config.text_config
    config.use_cache = True
    (note,) = explain(model).notes
    assert note.startswith("use_cache is on") and note.endswith(f"{path}.use_cache = False")
    assert f"note: {note}" in str(explain(model)) and note in explain(model).details()
    assert not explain(model.eval()).notes, "generation needs it"
    config.use_cache = False
    assert not explain(model.train()).notes
    config.use_cache = True
    model.gradient_checkpointing_enable()
    assert not explain(model).notes, "transformers leaves it out where blocks are checkpointed"


def test_an_encoder_has_no_cache() -> None:
    model = bert()
    model.config.use_cache = True
    assert not explain(model).notes


def test_calls_that_need_python_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch_replay.OBSTACLES, "no PTX", 3)
    (note,) = explain(bert()).notes
    assert note == "3 kinds of calls on a GPU run in Python, with ten times the processor time: no PTX"


def test_kinds_without_a_kernel_are_named() -> None:
    model = get_peft_model(Words(), LoraConfig(target_modules=["words", "mix", "stretch"]))  # type: ignore[arg-type]
    bind(model)
    rows = {row.name: (row.kind, row.path, row.reason) for row in explain(model)}
    assert rows == {
        "words": ("lora.Embedding", "peft", "lora.Embedding has no kernel"),
        "mix": ("lora.Linear", "safe_kernels::lora", ""),
        "stretch": ("lora.Conv1d", "safe_kernels::lora_conv", ""),
    }


def test_dora_is_an_op_of_its_own() -> None:
    model = bert(use_dora=True)
    assert {row.reason for row in explain(model)} == {"not bound: bind(model) puts it on safe_kernels::dora"}
    bind(model)
    assert {(row.path, row.reason) for row in explain(model)} == {("safe_kernels::dora", "")}


def test_it_follows_the_models_state() -> None:
    model = bert()
    bind(model)
    with model.disable_adapter():
        assert {row.reason for row in explain(model)} == {"adapters are disabled"}
    model.merge_adapter()
    assert {row.reason for row in explain(model)} == {"adapters are merged into the base weight"}
    model.unmerge_adapter()
    assert {row.path for row in explain(model)} == {"safe_kernels::lora"}


def test_it_tells_frozen_from_fixed() -> None:
    model = bert()
    fixed = "bert.encoder.layer.1.output.dense"
    model.get_submodule(f"base_model.model.{fixed}").lora_A.requires_grad_(False)
    model.get_submodule(f"base_model.model.{fixed}").lora_B.requires_grad_(False)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(score="random"), total_steps=10)
    train(model, optimizer, batches(10), freezer)
    rows = explain(model)
    assert {row.name for row in rows if row.frozen} == set(freezer.frozen)
    assert not rows[fixed].frozen and not rows[fixed].trainable
    assert all(row.trainable != row.frozen for row in rows if row.name != fixed)
    assert all(row.path == "safe_kernels::lora_linear" for row in rows)


def test_other_methods_and_plain_models() -> None:
    plain = bert().unload()
    loha = get_peft_model(plain, LoHaConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    assert {(row.kind, row.path, row.reason) for row in explain(loha)} == {
        ("loha.Linear", "peft", "loha.Linear is not covered")
    }
    assert str(explain(torch.nn.Linear(2, 2))).startswith("no adapter layers")
    base = BertForSequenceClassification(plain.config)
    prompts = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    assert [row.reason for row in explain(prompts)] == ["prompt learning is not covered"]
