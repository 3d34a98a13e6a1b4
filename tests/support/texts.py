"""A tiny model with a tokenizer in a folder, and files of labelled text that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

GOOD, BAD, OTHER = ("good", "fine", "great"), ("bad", "dull", "poor"), ("the", "a", "film", "was", "plot", "very")
WORDS = (*GOOD, *BAD, *OTHER)


def save_tokenizer(folder: Path, **special: str) -> None:
    names = ["[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)


def bert_folder(folder: Path) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,  # stock PEFT's and ours draw different numbers
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    save_tokenizer(folder, pad_token="[PAD]")
    return str(folder)


def gpt2_folder(folder: Path) -> str:
    """A decoder whose tokenizer has no padding token, as most have none."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 2, n_positions=32, n_embd=32, n_layer=2, n_head=2, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder, eos_token="[PAD]")
    return str(folder)


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chance.choice(("negative", "positive"))
        words = [chance.choice(OTHER) for _ in range(chance.randint(3, 9))]
        words.insert(chance.randrange(len(words)), chance.choice(GOOD if label == "positive" else BAD))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
