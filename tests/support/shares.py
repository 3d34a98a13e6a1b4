"""The same training in one process and in several that share its batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tiny import adamw, batches, bert, train
from torch import Tensor, nn

from safe_peft import AdapterFreezer, SafeConfig

ROWS, LENGTH = 8, 12
SAME_ROWS = {"score_blocks": 8, "block_rows": 12}
"""Blocks of rows that one process and several choose alike: all of them."""
STEPS = 16
OPTIONS = {"warmup": 2, "max_warmup": 4, "freeze_end": 14, "freeze_interval": 3, "score_interval": 2} | SAME_ROWS
LONG_STEPS = 64
LONG = {"warmup": 4, "max_warmup": 8, "freeze_end": 56, "freeze_interval": 8, "score_interval": 4} | SAME_ROWS
"""For once an engine: the other tests need a few freezings each, and no length."""
TOLERANCE = 2e-6
"""Of a mean loss near 0.7 in fp32, over 64 steps: sums are taken in another order."""


def share(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """One process's rows."""
    return {name: column.chunk(world)[rank] for name, column in batch.items()}


def shares(steps: int, rank: int, world: int, **options: Any) -> Iterator[dict[str, Tensor]]:
    return (share(batch, rank, world) for batch in batches(steps, rows=ROWS, **options))


def events(freezer: AdapterFreezer) -> list[list[Any]]:
    return [[freezing.step, freezing.name] for freezing in freezer.ledger.freezings]


def digest(model: nn.Module) -> list[float]:
    """What tells two models' weights apart."""
    return [float(parameter.detach().double().abs().sum()) for parameter in model.parameters()]


def alone(steps: int = STEPS, schedule: dict[str, Any] = OPTIONS, **options: Any) -> dict[str, Any]:
    """The oracle: one process that sees the whole batch."""
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**schedule | options))
    losses = train(model, optimizer, batches(steps, rows=ROWS), freezer)
    return {"losses": losses, "events": events(freezer), "digest": digest(model)}


def assert_equal(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Every process froze the same at the same step, and together they trained as one does."""
    for rank in ranks:
        assert rank["events"] == expected["events"] and rank["events"]
        assert rank["digest"] == ranks[0]["digest"], "parameters have drifted apart: something was not reduced"
    means = [sum(losses) / len(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]
    differences = [abs(mean - loss) for mean, loss in zip(means, expected["losses"], strict=True)]
    assert max(differences) < TOLERANCE, max(differences)
    torch.testing.assert_close(torch.tensor(ranks[0]["digest"]), torch.tensor(expected["digest"]), rtol=1e-4, atol=1e-4)
