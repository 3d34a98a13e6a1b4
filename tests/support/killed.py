"""Trainings that are killed, and how they go on: `main` runs one raw loop and one Trainer, killed at many points.

A process costs seconds to start and a fork nothing, so it forks itself once for every operation on files that a save
makes, and each fork dies by SIGKILL just before its own.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny import adamw, batches, bert
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from safe_peft import AdapterFreezer, SafeCallback, SafeConfig, last_checkpoint

STEPS, SAVE_STEPS, ACCUMULATE = 12, 3, 2
SAVE_AT = 6
"""Killed while this step is saved: adapters were scored and frozen in it."""
KILLS, TORN = {"raw": 12, "trainer": 36}, 99
"""More than the operations on files of a save, which are 8 and 32."""
OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
CONFIG = SafeConfig(warmup=2, max_warmup=4, freeze_end=10, freeze_interval=2, score_interval=3, freeze_by="adapters")
RAW_CONFIG = SafeConfig.from_dict({**CONFIG.to_dict(), "score": "gradient_sensitivity"})
RAW_SAVE_AT = 13
"""Micro-steps: in the middle of an accumulation."""


class Rows(torch.utils.data.Dataset):
    """Rows for a Trainer that shuffles them: an epoch is eight steps."""

    def __init__(self) -> None:
        self.rows = [{name: batch[name][row] for name in batch} for batch in batches(8) for row in range(8)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def trainer(folder: Path, config: SafeConfig = CONFIG, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": ACCUMULATE,
            "learning_rate": 3e-3,
            "logging_steps": 2,
            "save_steps": SAVE_STEPS,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    model = bert(lora_dropout=0.1)
    data = {"train_dataset": Rows(), "eval_dataset": Rows()}
    return Trainer(model=model, args=args, callbacks=[*callbacks, SafeCallback(config)], **data)


def callback_of(run: Trainer) -> SafeCallback:
    return next(callback for callback in run.callback_handler.callbacks if isinstance(callback, SafeCallback))


class RawLoop:
    """A loop as users write it, that saves after every micro-step."""

    def __init__(self, folder: Path, config: SafeConfig = RAW_CONFIG) -> None:
        torch.manual_seed(0)
        self.folder, self.done = folder, 0
        self.model: PeftModel = bert(lora_dropout=0.1)
        self.optimizer = adamw(self.model)
        self.freezer = AdapterFreezer(self.model, self.optimizer, config)
        largest = batches(1, rows=12, seed=2)  # seen before any stop, and to be remembered after it
        self.data = [*largest, *batches(STEPS * ACCUMULATE - 1)]
        torch.manual_seed(5)

    def run(self, until: int = STEPS * ACCUMULATE, save: bool = False) -> RawLoop:
        for batch in self.data[self.done : until]:
            (self.model(**batch).loss / ACCUMULATE).backward()
            self.done += 1
            if self.done % ACCUMULATE == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.freezer.step()
            if save:
                self.save()
        return self

    def save(self) -> None:
        folder = self.folder / f"checkpoint-{self.done}"
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gradients": {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None},
            "rng": torch.get_rng_state(),
        }
        torch.save(parts, folder / "training.pt")
        self.freezer.save(folder / "safe_state.json", files=[folder / "training.pt"])

    def resume(self) -> RawLoop:
        found = last_checkpoint(self.folder)
        assert found is not None
        parts = torch.load(Path(found, "training.pt"), weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        for name, parameter in self.model.named_parameters():
            parameter.grad = parts["gradients"].get(name)
        self.freezer.load(Path(found, "safe_state.json"))
        torch.set_rng_state(parts["rng"])
        self.done = int(found.rpartition("-")[2])
        return self


# ---------------------------------------------------------------- dying


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(number: int) -> None:
    """Die just before an operation on files; all that came before is on its way to the disk, the rest is not."""
    left = [number]

    def count() -> None:
        if left[0] == 0:
            die()
        left[0] -= 1

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            count()

    sync = os.fsync
    os.fsync = lambda handle: (count(), sync(handle))[1]  # type: ignore[assignment]
    sys.addaudithook(audit)


def die_in_torch_save() -> None:
    """Die with half of a file written."""
    save = torch.save

    def half(parts: Any, path: Any, **options: Any) -> None:
        save(parts, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    torch.save = half


def fork_and_die(folder: Path, use: Callable[[Path], None]) -> bool:
    """Fork once for every way to die; True in a fork, which is to go on until it is dead."""
    for number in (*range(KILLS[folder.name]), TORN):
        copy = folder.with_name(f"{folder.name}-{number}")
        shutil.copytree(folder, copy)
        state = random.getstate()
        if (child := os.fork()) == 0:
            random.setstate(state)  # Python seeds it anew in a fork
            use(copy)
            die_in_torch_save() if number == TORN else die_at(number)
            return True
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return False


class Dying(TrainerCallback):
    """Forks before a save, and dies in the step after the next one; forks before, as autograd may not run in them."""

    last = SAVE_AT + 1

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        def use(copy: Path) -> None:
            args.output_dir = str(copy)

        if state.global_step == SAVE_AT and fork_and_die(Path(args.output_dir), use):
            self.last = SAVE_AT

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            die()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    loop = RawLoop(folder / "raw").run(RAW_SAVE_AT - 1, save=True).run(RAW_SAVE_AT)
    if fork_and_die(loop.folder, lambda copy: setattr(loop, "folder", copy)):
        loop.save()
        die()
    trainer(folder / "trainer", CONFIG, Dying(), save_total_limit=1).train()  # the older one goes before ours is whole
