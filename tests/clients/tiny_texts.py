"""A tokenizer of bytes, a tiny Llama, and rows in the shapes that text trainers expect."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] + ' .' }}"
    "{% endgeneration %}{% else %}Q: {{ m['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
SENTENCES = ["the cat sat", "a dog ran far away", "one two three four", "red and blue", "so it goes", "up we went then"]


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = CHAT
    return made


def llama(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        **options,
    )
    return kind(config)


def lora(**options: Any) -> LoraConfig:
    """With values in B, where many a mistake would not show with zeros; without dropout, whose masks are random."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options)


def rows(count: int, *columns: str) -> Dataset:
    """Each column a sentence, another one in every row."""
    return Dataset.from_list(
        [
            {column: SENTENCES[(row + 2 * place) % len(SENTENCES)] for place, column in enumerate(columns)}
            for row in range(count)
        ]
    )
