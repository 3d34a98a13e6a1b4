from __future__ import annotations

import sys

import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import adamw, batches, bert, gpt2, train
from torch import nn
from transformers import BertForSequenceClassification

import safe_peft
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
        assert row.reason == "not bound: after bind(model) safe_kernels::lora would serve it"


def test_a_bound_model_takes_the_fast_path_and_needs_no_reason() -> None:
    model = gpt2()
    with bind(model):
        assert {(row.path, row.reason) for row in explain(model)} == {("safe_kernels::lora", "")}
        assert "8 adapter layers: 8 by safe_kernels::lora" in str(explain(model))
    assert {row.path for row in explain(model)} == {"peft"}


def test_kinds_without_a_kernel_are_named() -> None:
    model = get_peft_model(Words(), LoraConfig(target_modules=["words", "mix", "stretch"]))  # type: ignore[arg-type]
    bind(model)
    rows = {row.name: (row.kind, row.path, row.reason) for row in explain(model)}
    assert rows == {
        "words": ("lora.Embedding", "peft", "lora.Embedding has no kernel"),
        "mix": ("lora.Linear", "safe_kernels::lora", ""),
        "stretch": ("lora.Conv1d", "peft", "lora.Conv1d has no kernel"),
    }


def test_dora_falls_back_bound_or_not() -> None:
    model = bert(use_dora=True)
    assert {row.reason for row in explain(model)} == {"LoRA variant DoRA"}
    bind(model)
    assert {(row.path, row.reason) for row in explain(model)} == {("peft", "LoRA variant DoRA")}


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
    assert all(row.path == "safe_kernels::lora" for row in rows)


def test_other_methods_and_plain_models() -> None:
    plain = bert().unload()
    ia3 = get_peft_model(plain, IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[]))
    assert {(row.kind, row.path, row.reason) for row in explain(ia3)} == {
        ("ia3.Linear", "peft", "ia3.Linear is not covered")
    }
    assert str(explain(torch.nn.Linear(2, 2))).startswith("no adapter layers")
    base = BertForSequenceClassification(plain.config)
    prompts = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    assert [row.reason for row in explain(prompts)] == ["prompt learning is not covered"]


def test_the_function_is_not_shadowed_by_the_module_of_its_name() -> None:
    assert "safe_peft.explain" in sys.modules
    assert callable(safe_peft.explain)
