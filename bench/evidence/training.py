"""MiniLM on film sentences: a training up to a fork, and trainings that continue from it with other adapters frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import torch
from minilm import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

from safe_peft import bind
from safe_peft.binding.adapters import Adapter


@dataclass(frozen=True)
class Task:
    """The sizes of the experiment.

    Args:
        steps: optimizer steps of a whole training.
        fork: the step after which the trainings of one seed differ.
        batch_size: rows per batch.
        max_length: a sentence is cut after this many tokens.
        test_rows: rows of the test.
        learning_rate: AdamW's peak; it rises over 6 % of the steps and then falls linearly to zero.
        dropout: LoRA's dropout.
    """

    steps: int = 160
    fork: int = 24
    batch_size: int = 32
    max_length: int = 64
    test_rows: int = 5446
    learning_rate: float = 3e-3
    dropout: float = 0.1


class Data:
    """The sentences, as batches: 5,120 train; the test has its own rows, and the training rows that are left."""

    def __init__(self, task: Task) -> None:
        self._task = task
        tokenizer = AutoTokenizer.from_pretrained(assets.fetch("minilm"))
        train, test = assets.load_film_reviews()
        rows = 5120
        self.train, held = train[:rows], [*test, *train[rows:]]
        self.test = held[: task.test_rows]
        self._encode = lambda examples: tokenizer(
            [example[0] for example in examples],
            padding=True,
            truncation=True,
            max_length=task.max_length,
            return_tensors="pt",
        )

    def batch(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Return examples as a padded batch with labels."""
        return {**self._encode(examples), "labels": torch.tensor([example[1] for example in examples])}

    def training(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of a whole training: every seed has its own order."""
        generator, size = torch.Generator().manual_seed(seed), self._task.batch_size
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for begin in range(0, len(order) - size + 1, size):
                yield self.batch([self.train[index] for index in order[begin : begin + size]])

    def tests(self) -> Iterator[dict[str, Tensor]]:
        """Yield the test in batches of sentences of similar length."""
        ordered = sorted(self.test, key=lambda example: len(example[0]))
        for begin in range(0, len(ordered), 128):
            yield self.batch(ordered[begin : begin + 128])


class Training:
    """One training; it begins at the first step, or continues from a fork.

    Args:
        task: the sizes.
        data: the batches.
        seed: of initial values, batches and dropout.
    """

    def __init__(self, task: Task, data: Data, seed: int) -> None:
        self.task, self.data, self.seed, self.done = task, data, seed, 0
        torch.manual_seed(seed)
        self.model = make_model(task.dropout)
        self.binding = bind(self.model)
        self.adapters: list[Adapter] = self.binding.live_adapters()
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.named.values(), lr=task.learning_rate, weight_decay=0.01)
        warmup = round(0.06 * task.steps)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, warmup, task.steps)

    def run(self, until: int, after: Callable[[], object] = lambda: None) -> float:
        """Train up to a step. Returns the processor seconds.

        Args:
            until: optimizer steps done at the end.
            after: called after each step.
        """
        batches, start = self.data.training(self.seed), time.process_time()
        self.model.train()
        for step in range(until):
            batch = next(batches)
            if step < self.done:
                continue
            torch.manual_seed(1000 * self.seed + step)  # the same dropout in all trainings of a seed
            self.model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(self.named.values(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            after()
        self.done = until
        return time.process_time() - start

    def freeze(self, names: Sequence[str]) -> None:
        """Freeze adapters for the rest of the training."""
        for adapter in self.adapters:
            if adapter.name in names:
                adapter.freeze()
                for parameter in adapter.parameters():
                    self.optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        """Return the mean cross entropy and the accuracy on the test rows."""
        self.model.eval()
        loss = right = count = 0.0
        for batch in self.data.tests():
            labels = batch.pop("labels")
            logits = self.model(**batch).logits
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(-1) == labels).sum())
            count += len(labels)
        self.model.train()
        return {"cross_entropy": loss / count, "accuracy": right / count}

    def save(self, path: Path) -> None:
        """Write what trains and the optimizer's state, as safetensors."""
        tensors = {f"value.{name}": p.detach() for name, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        unfinished.replace(path)

    def load(self, path: Path, done: int) -> None:
        """Continue from the output of `save`, after so many steps."""
        tensors = load_file(path)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"value.{name}"])
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
                self.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in keys}
        for _ in range(done):
            self.schedule.step()
        self.done = done


def forked(task: Task, data: Data, seed: int, folder: Path) -> Training:
    """Return a training after the fork; the steps up to it run once per seed."""
    path = folder / f"fork-{seed}.safetensors"
    if not path.exists():
        first = Training(task, data, seed)
        first.run(task.fork)
        first.save(path)
    training = Training(task, data, seed)
    training.load(path, task.fork)
    return training
