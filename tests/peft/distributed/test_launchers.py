"""A Trainer, accelerate and torchrun on two processes."""

from __future__ import annotations

import functools
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import assets
import pytest
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from ranks import each_together, mend_versions, together
from shares import OPTIONS, ROWS, STEPS, alone, assert_equal, events, shares
from tiny import Rows, adamw, bert
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

from safe_peft import AdapterFreezer, SafeCallback, SafeConfig
from safe_peft.callback import NO_WAY_BACK
from safe_peft.distributed.fsdp import whole

EXAMPLE = Path(__file__).parents[3] / "examples" / "torchrun.py"

expected = functools.cache(alone)


def digest(model: nn.Module) -> list[float]:
    return [float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters()]


PLUGIN = {
    "fsdp_version": 2,
    "auto_wrap_policy": "transformer_based_wrap",
    "transformer_cls_names_to_wrap": ["BertLayer"],
    "cpu_ram_efficient_loading": False,
}


def as_fsdp2(accelerator: Accelerator) -> None:
    """Accelerate shards on accelerators only; its code does not mind a CPU."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**PLUGIN)


def accelerate(rank: int, sharded: bool, freezer_first: bool) -> dict[str, Any]:
    accelerator = Accelerator(cpu=True)
    if sharded:
        as_fsdp2(accelerator)
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS)) if freezer_first else None
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    freezer = freezer or AdapterFreezer(wrapped, optimizer, SafeConfig(**OPTIONS))
    losses = []
    for batch in shares(STEPS, rank, 2):
        loss = wrapped(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        losses.append(loss.item())
    kind = "FSDP2" if isinstance(wrapped, FSDPModule) else type(wrapped).__name__
    return {"losses": losses, "events": events(freezer), "digest": digest(model), "kind": kind}


def test_accelerate_with_ddp_equals_one_process() -> None:
    for ranks in each_together(accelerate, [(False, freezer_first) for freezer_first in (False, True)]):
        assert ranks[0]["kind"] == "DistributedDataParallel"
        assert_equal(ranks, expected())


def test_accelerate_with_fsdp2_equals_one_process() -> None:
    ranks = together(accelerate, True, False)
    assert ranks[0]["kind"] == "FSDP2"
    assert_equal(ranks, expected())


def make_trainer(folder: str, rows: int, callback: SafeCallback) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=STEPS // 2,
        use_cpu=True,
        report_to=[],
        average_tokens_across_devices=False,  # Trainer would multiply this model's loss, a mean, by the processes
    )
    return Trainer(model=bert(), args=arguments, train_dataset=Rows(ROWS * STEPS), callbacks=[callback])


def train_by_trainer(rank: int, folder: str, rows: int) -> dict[str, Any]:
    callback = SafeCallback(SafeConfig(**OPTIONS))
    trainer = make_trainer(folder, rows, callback)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    kind = type(trainer.model_wrapped).__name__
    return {"losses": losses, "events": events(callback.freezer), "digest": digest(trainer.model), "kind": kind}


def test_a_trainer_equals_one_process(tmp_path: Path) -> None:
    ranks = together(train_by_trainer, str(tmp_path / "two"), ROWS // 2)
    one = together(train_by_trainer, str(tmp_path / "one"), ROWS, world=1)[0]
    assert ranks[0]["kind"] == "DistributedDataParallel"
    assert_equal([{**rank, "losses": ranks[0]["losses"] or rank["losses"]} for rank in ranks], one)
    assert (tmp_path / "two" / f"checkpoint-{STEPS // 2}" / "safe_state.json").exists()


class Messages(logging.Handler):
    """What is logged in a process, where no fixture reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def sharded_trainer(folder: str) -> Trainer:
    trainer = make_trainer(folder, ROWS // 2, SafeCallback(SafeConfig(**OPTIONS)))
    as_fsdp2(trainer.accelerator)
    trainer.is_fsdp_enabled = True
    return trainer


def go_on_by_a_sharded_trainer(rank: int, folder: str) -> list[str]:
    mend_versions()
    messages = Messages()
    logging.getLogger("safe_peft.callback").addHandler(messages)
    sharded_trainer(folder).train()
    again = sharded_trainer(folder)
    with pytest.raises(BaseException, match="Missing key in checkpoint state_dict") as error:  # torch's is no Exception
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}")
    return [*messages.found, type(error.value).__name__]


def test_a_trainer_under_fsdp2_says_that_it_cannot_go_on(tmp_path: Path) -> None:
    """If one day it can, docs/resume.md and the warning have to go."""
    expected = [NO_WAY_BACK, "CheckpointException"]
    assert together(go_on_by_a_sharded_trainer, str(tmp_path)) == [expected] * 2


@pytest.mark.slow
def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    assets.fetch("minilm")
    assets.fetch("film-reviews")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLE), "--steps=6", "--rows=2", f"--output={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    frozen, adapters = map(int, re.findall(r"(\d+) of (\d+) frozen", done.stdout)[-1])
    assert adapters >= 36 and 0.75 * adapters <= frozen < adapters
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
