"""DDP without `find_unused_parameters`: freezing equals one process, and what is frozen is not sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import together
from tiny import EARLY, adamw, batches, bert, train
from torch.nn.parallel import DistributedDataParallel

from safe_peft import AdapterFreezer, SafeConfig

ROWS, STEPS = 8, 64
SLOW = {"warmup": 4, "max_warmup": 8, "freeze_end": 56, "freeze_interval": 8, "score_interval": 4, "score_blocks": 8, "block_rows": 12}


def part(batch: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    return {name: column.chunk(world)[rank] for name, column in batch.items()}


def own_batches(steps: int, rank: int, world: int, **options: Any) -> Any:
    return (part(batch, rank, world) for batch in batches(steps, rows=ROWS, **options))


def count_bytes(ddp: DistributedDataParallel) -> list[int]:
    """The bytes of every bucket that is sent."""
    sent: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def] # DDP reads annotations, and wants them to be classes
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        flat = bucket.buffer().div_(torch.distributed.get_world_size())
        future = torch.distributed.all_reduce(flat, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    return sent


def run_ddp(rank: int, ddp_options: dict[str, Any], inner: bool = False) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    model = bert()
    ddp = DistributedDataParallel(model, **ddp_options)
    sent = count_bytes(ddp)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model if inner else ddp, optimizer, SafeConfig(**SLOW))
    losses, traffic = [], []
    for batch in own_batches(STEPS, rank, world):
        sent.clear()
        losses += train(ddp, optimizer, iter([batch]), freezer)
        traffic.append(sum(sent))
    live = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    return {"losses": losses, "frozen": freezer.frozen, "traffic": traffic, "live": live,
            "weights": [float(p.double().sum()) for p in model.parameters()]}  # fmt: skip


OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "view": {"gradient_as_bucket_view": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_freezing_equals_one_process(options):
    a, b = together(run_ddp, options)
    print(a["traffic"], a["live"], a["frozen"], len(a["frozen"]))
    assert a["frozen"] == b["frozen"]
    model = bert()
    opt = adamw(model)
    freezer = AdapterFreezer(model, opt, SafeConfig(**SLOW))
    losses = train(model, opt, batches(STEPS, rows=ROWS), freezer)
    both = [(x + y) / 2 for x, y in zip(a["losses"], b["losses"])]
    print(max(abs(x - y) for x, y in zip(both, losses)))
    assert freezer.frozen == a["frozen"]
