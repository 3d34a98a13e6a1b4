"""What a training costs: retained bytes and FLOPs of one step, and the peak of the process's memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from safe_kernels import retention

from ..loss import Loss, flop_formulas, own_loss

Batch = dict[str, Any]


@contextmanager
def _unseen(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Run steps that training does not notice: random state, mode and gradients are as before."""
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
    """Return the bytes autograd retains for backward from one training forward, parameters aside.

    Args:
        model: in whatever mode; measured in training mode.
        batch: with labels.
        loss: how the training computes its loss.

    Example:
        >>> retained_bytes(model, batch)  # doctest: +SKIP
        241172480
    """
    with _unseen(model, batch):
        return retention.measure(lambda: loss(model, batch), exclude=[model, *batch.values()]).bytes


def step_flops(model: nn.Module, batch: Batch, loss: Loss = own_loss) -> int:
    """Return the FLOPs of one forward and backward, as torch counts them: matrix products and attention.

    Args:
        model: in whatever mode; measured in training mode. Its gradients are dropped.
        batch: with labels.
        loss: how the training computes its loss.

    Example:
        >>> step_flops(model, batch)  # doctest: +SKIP
        152471109632
    """
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with _unseen(model, batch):
        with torch.no_grad():
            loss(model, batch)  # which compares itself with the model's own loss, where it has not done so before
        with counter:
            value = loss(model, batch)
            if value.requires_grad:
                value.backward()
    return int(counter.get_total_flops())


def peak_rss() -> int:
    """Return this process's peak resident set so far, in bytes; 0 where the system does not tell.

    On Linux this is the peak of the process's own memory map. getrusage would not do: its peak outlives exec, so that a
    child inherits the size of the process that started it.

    Example:
        >>> peak_rss() > 0  # doctest: +SKIP
        True
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
