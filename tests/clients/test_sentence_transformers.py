"""sentence-transformers: the PEFT layers lie in a module of a SentenceTransformer, and the batch is many batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.models import Pooling, Transformer
from side_by_side import Compared, side_by_side
from tiny_texts import lora, rows, tokenizer
from transformers import BertConfig, BertModel

from safe_peft import SafeConfig


def names(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = folder.parent / "base"
    BertModel(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    model = SentenceTransformer(modules=[Transformer(str(base)), Pooling(32)], device="cpu")
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=12,
        per_device_train_batch_size=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    targets = ["query", "key", "value", "intermediate.dense", "output.dense"]
    return {"model": model, "args": args, "data": rows(36, "anchor", "positive"), "lora": lora(target_modules=targets)}


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]) -> None:
    line, done = side_by_side("sentence-transformers", "sentence-transformers", names, tmp_path, monkeypatch)
    table.append(line)
    assert (done["ours"].folder / "adapter_model.safetensors").exists()


def test_bytes_are_planned_behind_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]
) -> None:
    def by_bytes(folder: Path) -> dict[str, Any]:
        return {**names(folder), "config": SafeConfig(freeze_by="bytes", target_fraction=0.6)}

    line, _ = side_by_side("sentence-transformers, bytes", "sentence-transformers", by_bytes, tmp_path, monkeypatch)
    table.append(line)
