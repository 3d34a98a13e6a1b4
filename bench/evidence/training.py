"""A training up to a fork, and trainings that continue from it with other adapters frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import get_linear_schedule_with_warmup

from evidence.tasks import Data, Task
from safe_peft import bind
from safe_peft.binding.adapters import Adapter


class Training:
    """One training; it begins at the first step, or continues from a fork.

    Args:
        task: the sizes.
        data: the batches.
        seed: of the order of the batches, and of dropout.
    """

    def __init__(self, task: Task, data: Data, seed: int) -> None:
        self.task, self.data, self.seed, self.done = task, data, seed, 0
        self.model = task.make_model()
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
            logits, labels = self.data.judged(self.model(**batch).logits, batch["labels"])
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(-1) == labels).sum())
            count += float((labels != -100).sum())
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
