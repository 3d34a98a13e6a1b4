"""The tasks of the experiments: real weights and real sentences, as batches.

All tasks read the same sentences about films. "film": are they positive or negative (MiniLM)? "order": were two
neighbouring words swapped (MiniLM)? "text": what is the next token (SmolLM2-135M)?
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import assets
import minilm
import smollm2
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

Example = tuple[str, int]
"""A sentence and its label."""
ROWS = 5120
"""Sentences that may train. The others test."""


@dataclass(frozen=True)
class Task:
    """A task and its sizes.

    Args:
        name: of the task.
        steps: optimizer steps of a whole training.
        fork: the step after which the trainings of one seed differ.
        batch_size: rows per batch.
        epochs: passes over the training rows. With more than one, fewer rows are used. If there are too few
            rows for all steps, another pass begins.
        max_length: a sentence is cut after this many tokens.
        test_rows: rows of the test.
        learning_rate: AdamW's peak; it rises over 6 % of the steps and then falls linearly to zero.
        dropout: LoRA's dropout.
    """

    name: str = "film"
    steps: int = 160
    fork: int = 24
    batch_size: int = 32
    epochs: int = 1
    max_length: int = 64
    test_rows: int = 5446
    learning_rate: float = 2e-3
    dropout: float = 0.1

    def make_model(self) -> nn.Module:
        """Return the model with LoRA on every linear layer, in training mode."""
        return (smollm2 if self.name == "text" else minilm).make_model(self.dropout)


TASKS = {
    "film": Task(),
    "order": Task(name="order"),
    "text": Task(name="text", batch_size=8, test_rows=500, learning_rate=1e-3),
}


def with_swapped_words(examples: Sequence[Example]) -> list[Example]:
    """Swap two neighbouring words in half of the sentences; the label says whether. The same call, the same words.

    Example:
        >>> with_swapped_words([("a film that I like", 0), ("it is too long for me", 1)])
        [('a film I that like', 1), ('it is too long for me', 0)]
    """
    draw, found = random.Random(0), []
    for text, _ in examples:
        words, label = text.split(), draw.randrange(2)
        places = [place for place, pair in enumerate(pairwise(words)) if pair[0] != pair[1]]
        if places and label:
            place = draw.choice(places)
            words[place : place + 2] = words[place + 1], words[place]
        found.append((" ".join(words), label if places else 0))
    return found


class Data:
    """The sentences of a task, as batches. The test has its own rows, and the training rows that are left."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._tokenizer = AutoTokenizer.from_pretrained(assets.fetch("smollm2" if task.name == "text" else "minilm"))
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        change: Callable[[Sequence[Example]], Sequence[Example]]
        change = with_swapped_words if task.name == "order" else list
        train, test = map(change, assets.load_film_reviews())
        self.train = train[: min(ROWS, task.steps * task.batch_size // task.epochs)]
        self.test = [*test, *train[ROWS:]][: task.test_rows]

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return examples as a padded batch with labels."""
        encoded = self._tokenizer(
            [text for text, _ in examples],
            padding=True,
            truncation=True,
            max_length=self.task.max_length,
            return_tensors="pt",
        )
        if self.task.name == "text":
            labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        else:
            labels = torch.tensor([label for _, label in examples])
        return {**encoded, "labels": labels}

    def training(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of a whole training: every seed has its own order."""
        generator, size = torch.Generator().manual_seed(seed), self.task.batch_size
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for begin in range(0, len(order) - size + 1, size):
                yield self.batch([self.train[index] for index in order[begin : begin + size]])

    def tests(self) -> Iterator[dict[str, Tensor]]:
        """Yield the test in batches of sentences of similar length."""
        ordered, size = sorted(self.test, key=lambda example: len(example[0])), 4 * self.task.batch_size
        for begin in range(0, len(ordered), size):
            yield self.batch(ordered[begin : begin + size])

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return one row of logits and one label per decision; label -100 means none."""
        if self.task.name != "text":
            return logits, labels
        return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
