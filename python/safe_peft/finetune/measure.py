"""The cost of a training: retained bytes and FLOPs of one step, and the peak memory of the process."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from safe_kernels import retention

from ..loss import Loss, own_loss

Batch = dict[str, Any]


@contextmanager
def _unseen(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Run steps in training mode without effect on training: restore the random state and the mode.

    Gradients are dropped.
    """
    device = batch["input_ids"].device
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def retained_bytes(model: nn.Module, batch: Batch, loss: Loss = own_loss) -> int:
    """Return the bytes that autograd retains for backward from one training forward, without parameters."""
    with _unseen(model, batch):
        return retention.measure(lambda: loss(model, batch), exclude=[model, *batch.values()]).bytes


def step_flops(model: nn.Module, batch: Batch, loss: Loss = own_loss) -> int:
    """Return the FLOPs of one forward and backward, as torch counts them: matrix products and attention."""
    counter = FlopCounterMode(display=False)
    with _unseen(model, batch):
        with torch.no_grad():
            loss(model, batch)  # the first call may also compare it with the model's own loss
        with counter:
            value = loss(model, batch)
            if value.requires_grad:
                value.backward()
    return int(counter.get_total_flops())


def block_flops(model: nn.Module, batch: Batch, loss: Loss, blocks: Collection[str]) -> dict[str, int]:
    """Return the FLOPs of one forward of each transformer block, by its path without PEFT's prefix."""
    counter = FlopCounterMode(display=False)
    with _unseen(model, batch), torch.no_grad(), counter:
        loss(model, batch)
    found = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return {block: next((n for name, n in found.items() if name.endswith(f".{block}")), 0) for block in blocks}


def peak_rss() -> int:
    """Return this process's peak resident set so far, in bytes; 0 if the system does not report it.

    On Linux this is the peak of the process's own memory map. getrusage is not suitable: its peak survives exec, so a
    child inherits the peak of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
