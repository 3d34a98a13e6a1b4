"""PeftModel of every task type, adapters without a PeftModel, and methods other than LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from families import family
from life import assert_same, assert_same_files
from peft import LoraConfig, get_peft_model
from tiny import EARLY, adamw, batches, bert, causal_batches, gpt2, randomise_adapters, train
from torch import Tensor, nn

from safe_peft import AdapterFreezer, BindingError, SafeConfig, bind, explain

BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TASKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "SEQ_CLS": (hf.BertForSequenceClassification, {"labels": torch.zeros(8, dtype=torch.long)}),
    "TOKEN_CLS": (hf.BertForTokenClassification, {"labels": torch.zeros(8, 12, dtype=torch.long)}),
    "QUESTION_ANS": (
        hf.BertForQuestionAnswering,
        {"start_positions": torch.ones(8, dtype=torch.long), "end_positions": torch.full((8,), 2)},
    ),
    "FEATURE_EXTRACTION": (hf.BertModel, {}),
    "CAUSAL_LM": (hf.GPT2LMHeadModel, {}),
    "SEQ_2_SEQ_LM": (hf.T5ForConditionalGeneration, {}),
}


def of_task(task: str) -> tuple[peft.PeftModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    kind, labels = TASKS[task]
    if task == "CAUSAL_LM":
        model, batch = gpt2(), next(causal_batches(1))
    elif task == "SEQ_2_SEQ_LM":
        t5 = family("t5")
        options = LoraConfig(task_type=task, target_modules=["q", "v"])
        model, batch = get_peft_model(t5.make(1, 0.0), options), t5.batch()
    else:
        no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        options = LoraConfig(task_type=task, target_modules=["query", "output.dense"])
        model = get_peft_model(kind(hf.BertConfig(**BERT, **no_dropout)), options)
        batch = {name: value for name, value in next(batches(1)).items() if name != "labels"} | labels
    randomise_adapters(model)
    return model.train(), batch


@pytest.mark.parametrize("task", TASKS)
def test_a_model_of_every_task_type_gives_the_same_and_freezes(task: str) -> None:
    results = []
    for wrap in (False, True):
        model, batch = of_task(task)
        assert model.peft_config["default"].task_type == task
        freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)) if wrap else None
        outputs = model(**batch)
        loss = outputs.loss if "loss" in outputs else outputs.last_hidden_state.square().mean()
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_same(results[1], results[0])
    freezer.step()
    assert len(freezer.ledger.importance) == len(freezer.adapters) and not freezer.unscored


@pytest.fixture
def _any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of transformers ask for a release of PEFT that is not out yet; what they call is there."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda *args, **kwargs: None)


def native() -> hf.PreTrainedModel:
    """A plain model of transformers that holds adapters itself."""
    torch.manual_seed(0)
    model = bert().unload()
    model.add_adapter(LoraConfig(r=4, target_modules=["query", "value"]), "first")
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]), "second")
    randomise_adapters(model)
    model.set_adapter("first")
    return model.train()


@pytest.mark.usefixtures("_any_peft")
def test_adapters_inside_a_plain_transformers_model(tmp_path: Path) -> None:
    batch, results = next(batches(1)), []
    for name in ("stock", "bound"):
        model = native()
        if name == "bound":
            bind(model)
            assert {row.reason for row in explain(model)} == {""}
        one = model(**batch).logits
        model.set_adapter("second")
        other, active = model(**batch).logits, model.active_adapters()
        model.disable_adapters()
        off = model(**batch).logits
        model.enable_adapters()
        model.set_adapter("first")
        model.save_pretrained(tmp_path / name)
        results.append((one, other, active, off, model.get_adapter_state_dict("first")))
        model.delete_adapter("second")
        model.load_adapter(str(tmp_path / name), "again")
        results[-1] += (model(**batch).logits,)
    assert_same(results[1], results[0])
    assert_same_files(tmp_path / "bound", tmp_path / "stock")


@pytest.mark.usefixtures("_any_peft")
def test_they_freeze_too() -> None:
    model = native()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    train(model, optimizer, batches(14), freezer)
    assert len(freezer.frozen) == 3
    model.disable_adapters()
    model.enable_adapters()  # PEFT thaws
    model(**next(batches(1))).loss.backward()
    assert all(p.grad is None for a in freezer.adapters if a.name in freezer.frozen for p in a.parameters())


def test_adapters_injected_into_a_bare_module() -> None:
    results = []
    for wrap in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        module = peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), module)
        randomise_adapters(module)
        freezer = AdapterFreezer(module, adamw(module), SafeConfig(target_fraction=0.5, **EARLY)) if wrap else None
        out = module(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)))
        out.square().sum().backward()
        results.append((out, {name: p.grad for name, p in module.named_parameters()}))
    assert_same(results[1], results[0])
    freezer.step()
    assert list(freezer.ledger.importance) == ["0", "2"] and not freezer.unscored


OTHERS = {
    "loha.Linear": peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["query"], r=2),
    "lokr.Linear": peft.LoKrConfig(task_type="SEQ_CLS", target_modules=["query"], r=2),
    "vera.Linear": peft.VeraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2),
    "oft.Linear": peft.OFTConfig(task_type="SEQ_CLS", target_modules=["query"], oft_block_size=4),
    "adalora.SVDLinear": peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=10),
    "prompt learning": peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_methods_are_refused_by_name_and_left_as_they_are(kind: str) -> None:
    model = get_peft_model(bert().unload(), OTHERS[kind])
    rows = explain(model)
    assert {(row.kind, row.path, row.reason) for row in rows} == {(kind, "peft", f"{kind} is not covered")}
    before = model(**next(batches(1))).logits
    with pytest.raises(BindingError, match=r"no layer that can be bound|no adapter layer of PEFT"):
        bind(model)
    assert torch.equal(model(**next(batches(1))).logits, before)
    assert not any("_safe_state" in module.__dict__ for module in model.modules())
