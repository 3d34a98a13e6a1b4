"""The real thing, small: MiniLM's own weights on film reviews."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import assets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import BERT_TARGETS, adamw, train
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from safe_peft import AdapterFreezer, SafeConfig, explain


@pytest.fixture(scope="module")
def weights() -> Path:
    return assets.fetch("minilm")


def minilm(weights: Path, **lora: float) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        weights, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=BERT_TARGETS, **lora)).train()  # type: ignore[arg-type]


def sentences(weights: Path, count: int, rows: int = 4) -> Iterator[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(weights)
    good, bad = "a moving , funny film", "a dull and endless film"
    for step in range(count):
        labels = [(row + step) % 2 for row in range(rows)]
        texts = [f"{good if label else bad} about {'very ' * row}little" for row, label in enumerate(labels)]
        yield {**tokenizer(texts, padding=True, return_tensors="pt"), "labels": torch.tensor(labels)}


def test_wrapped_but_never_freezing_trains_like_stock_peft(weights: Path) -> None:
    stock, wrapped = minilm(weights), minilm(weights)
    expected = train(stock, adamw(stock, 1e-3), sentences(weights, 12))
    optimizer = adamw(wrapped, 1e-3)
    freezer = AdapterFreezer(wrapped, optimizer, SafeConfig(target_fraction=0.0), total_steps=12)
    assert train(wrapped, optimizer, sentences(weights, 12), freezer) == pytest.approx(expected, rel=1e-5)


def test_it_learns_while_three_quarters_freeze(weights: Path) -> None:
    model = minilm(weights, lora_dropout=0.1)
    optimizer = adamw(model, 1e-3)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(freeze_by="adapters"), total_steps=24)
    losses = train(model, optimizer, sentences(weights, 24), freezer)
    assert losses[-1] < 0.1 < losses[0]
    assert len(freezer.frozen) == 27 and not freezer.unscored
    assert all(row.path == "safe_kernels::lora_linear" for row in explain(model))
    assert all(0 < value < 1 for value in freezer.ledger.importance.values())
