"""TRL: the recipes for SFT, DPO, GRPO and reward modelling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from side_by_side import Compared, side_by_side
from tiny_texts import llama, lora, rows, tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

STEPS = 12


def options(folder: Path, **more: Any) -> dict[str, Any]:
    common = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=3,
    )
    return common | more


def sft(folder: Path) -> dict[str, Any]:
    args = SFTConfig(**options(folder), max_length=32)
    model = llama(LlamaForCausalLM)
    return {"model": model, "args": args, "data": rows(24, "text"), "lora": lora(), "tokenizer": tokenizer()}


def dpo(folder: Path) -> dict[str, Any]:
    args = DPOConfig(**options(folder), max_length=32)
    data = rows(24, "prompt", "chosen", "rejected")
    return {"model": llama(LlamaForCausalLM), "args": args, "data": data, "lora": lora(), "tokenizer": tokenizer()}


def grpo(folder: Path) -> dict[str, Any]:
    args = GRPOConfig(**options(folder), num_generations=2, max_completion_length=6)
    return {
        "model": llama(LlamaForCausalLM),
        "args": args,
        "data": rows(24, "prompt"),
        "lora": lora(),
        "tokenizer": tokenizer(),
        "reward": lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
    }


def reward(folder: Path) -> dict[str, Any]:
    args = RewardConfig(**options(folder), max_length=32)
    model = llama(LlamaForSequenceClassification, num_labels=1)
    data: Dataset = rows(24, "chosen", "rejected")
    return {"model": model, "args": args, "data": data, "lora": lora(task_type="SEQ_CLS"), "tokenizer": tokenizer()}


@pytest.mark.parametrize(
    ("client", "names"), [("TRL SFT", sft), ("TRL DPO", dpo), ("TRL GRPO", grpo), ("TRL Reward", reward)]
)
def test_a_trainer_of_trl(
    client: str, names: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[Compared]
) -> None:
    line, _ = side_by_side(client, client.lower().replace(" ", "-"), names, tmp_path, monkeypatch)
    table.append(line)
