"""Processes decide the same, and say so where they cannot: nothing hangs, nothing drifts apart."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import each_together, outcomes_of, together
from shares import digest, events, shares
from tiny import adamw, batches, bert, train
from torch.nn.parallel import DistributedDataParallel

from safe_peft import AdapterFreezer, BindingError, ConfigError, SafeConfig
from safe_peft.binding.adapters import ScoreInputs
from safe_peft.files import jsonio
from safe_peft.freezing.ledger import Ledger
from safe_peft.freezing.scores import register_score

SHORT = {"warmup": 2, "max_warmup": 4, "freeze_end": 12, "freeze_interval": 3, "score_interval": 2, "block_rows": 12}
SHORT |= {"freeze_by": "adapters"}


# ---------------------------------------------------------------- at construction


def differ(rank: int, what: str) -> str:
    layers, config, steps, first = 2, dict(SHORT), None, 0
    if rank == 1:
        if what == "adapters":
            layers = 1
        elif what == "config":
            config["seed"] = 7
        elif what == "schedule":
            steps = 50
        elif what == "first_step":
            first = 3
        else:
            layers = 0
    config["freeze_interval"] = 0.1 if what == "schedule" else config["freeze_interval"]
    model = bert(layers=layers) if layers else torch.nn.Linear(2, 2)
    with pytest.raises((BindingError, ConfigError)) as caught:
        AdapterFreezer(model, adamw(model), SafeConfig(**config), total_steps=steps or 100, first_step=first)
    assert not any(hasattr(module, "_safe_state") for module in model.modules()), "nothing of it is left"
    return str(caught.value)


def test_processes_that_differ_are_told_so_by_name() -> None:
    whats = ["config", "adapters", "schedule", "first_step"]
    for what, messages in zip(whats, each_together(differ, [(what,) for what in whats]), strict=True):
        for message in messages:
            assert message.startswith(f"{what}: every process must have the same value, but 0 has")


def test_a_process_that_cannot_begin_stops_the_others() -> None:
    first, second = together(differ, "model")
    assert first.startswith("process 1 of 2 cannot freeze adapters: Linear has no adapter layer")
    assert second.startswith("Linear has no adapter layer")


# ---------------------------------------------------------------- at a scoring step


def count_collectives(rank: int, score: str) -> tuple[list[int], list[int], int]:
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**SHORT, score=score))
    others = ("all_gather_object", "broadcast", "barrier", "all_gather", "broadcast_object_list")
    forbidden = mock.patch.multiple(torch.distributed, **dict.fromkeys(others))  # None cannot be called
    counted = mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce)
    steps = []
    for batch in shares(14, rank, 2):
        with forbidden, counted as calls:
            train(ddp, optimizer, iter([batch]), freezer)
        steps.append(calls.call_count)
    return steps, [scoring.step for scoring in freezer.ledger.scorings], len(freezer.frozen)


def test_a_scoring_is_one_all_reduce_and_another_step_is_none() -> None:
    scores = ("cka", "relative_norm", "gradient_sensitivity", "random")
    for steps, scorings, frozen in itertools.chain(*each_together(count_collectives, [(name,) for name in scores])):
        assert scorings == [2, 4, 6, 8, 10, 12] and frozen == 9
        assert steps == [1 if step in scorings else 0 for step in range(1, 15)]


def wrap_late(rank: int) -> dict[str, Any]:
    """Eight steps without DDP on the same batches; then a DDP that the freezer is not given."""
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**SHORT | {"score_interval": 1}))
    outer = model
    for step, batch in enumerate(shares(14, rank, 2), start=1):
        if step == 9:
            outer = DistributedDataParallel(model)
        train(outer, optimizer, iter([batch] if step >= 9 else batches(1, seed=step)), freezer)
    return {"events": events(freezer), "digest": digest(model)}


def test_a_wrapper_that_comes_in_the_middle_of_a_training_is_followed() -> None:
    first, second = together(wrap_late)
    assert first == second, "parameters stay the same: the reducer of a DDP that came late is made anew"
    assert sorted({step for step, _ in first["events"]}) == [7, 10, 12]


def train_in_groups_of_one(rank: int, explicit: bool) -> list[list[Any]]:
    """Each process is a pipeline's stage, say: another model, and a data-parallel group of its own."""
    groups = [torch.distributed.new_group([one]) for one in (0, 1)]
    model = bert(layers=1 + rank)
    ddp = DistributedDataParallel(model, process_group=groups[rank])
    optimizer = adamw(model)
    given = {"process_group": groups[rank]} if explicit else {}
    freezer = AdapterFreezer(model if explicit else ddp, optimizer, SafeConfig(**SHORT), **given)
    train(ddp, optimizer, batches(14 - rank), freezer)
    return events(freezer)


def test_only_the_group_that_shares_the_batch_decides_together() -> None:
    found, explicit = each_together(train_in_groups_of_one, [(False,), (True,)])
    for rank in (0, 1):
        model = bert(layers=1 + rank)
        optimizer = adamw(model)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**SHORT))
        train(model, optimizer, batches(14), freezer)
        assert found[rank] == explicit[rank] == events(freezer) != []


def longer_on_one(rank: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rank 1 has longer batches, the longest late."""
    for step, batch in enumerate(batches(16, rows=4, seed=5 + rank)):
        yield {
            name: column if column.dim() == 1 else column[:, : 6 + rank * min(step, 5)]
            for name, column in batch.items()
        }


def train_by_bytes(rank: int, options: dict[str, Any]) -> dict[str, Any]:
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**SHORT | options))
    train(ddp, optimizer, longer_on_one(rank), freezer)
    inputs = freezer.planner.planned.inputs
    return {"events": events(freezer), "recompute": sorted(freezer.binding.recompute), "elements": inputs.elements}


def test_decisions_by_bytes_are_for_the_largest_batch_of_all() -> None:
    budget = {"memory_budget": 60_000}
    options = [{"freeze_by": "bytes", "target_fraction": 0.6}, budget, {**budget, "recompute": "auto"}]
    for first, second in each_together(train_by_bytes, [(one,) for one in options]):
        assert first == second and first["events"]
        assert first["elements"] == 4 * 11, "rank 1's"


def train_with_nan(rank: int, score: str) -> dict[str, Any]:
    """What rank 1 has gathered about one adapter is not finite."""
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)

    @register_score("sum")
    def total(evidence: ScoreInputs) -> float:
        A, B = evidence.lora_A(), evidence.lora_B()
        assert A is not None and B is not None
        spoilt = rank == 1 and tuple(A.shape) == (4, 64) and evidence.scaling == 4.0
        return math.inf if spoilt else float(B.abs().sum())

    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**SHORT, score=score))
    if score == "sum":
        freezer.adapters[5].layer.scaling["default"] = 4.0
    elif rank == 1:
        gather = freezer._scorer.collector.finish
        freezer._scorer.collector.finish = lambda: gather().index_fill(0, torch.tensor(5), math.nan)
    train(ddp, optimizer, shares(14, rank, 2), freezer)
    return {"events": events(freezer), "unscored": freezer.unscored}


@pytest.mark.parametrize("score", ["cka", "sum"])
def test_what_is_not_finite_in_one_process_freezes_in_none(score: str) -> None:
    first, second = together(train_with_nan, score)
    assert first == second and first["events"]
    assert first["unscored"] == ("bert.encoder.layer.0.output.dense",)


def come_apart(rank: int, how: str) -> str:
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**SHORT))
    state = freezer.state_dict()
    data = list(shares(8, rank, 2))
    train(model, optimizer, iter(data[:6]), freezer)
    if rank == 1:
        state = state if how == "older checkpoint" else {**freezer.state_dict(), "ledger": jsonio.encode(Ledger())}
        freezer.load_state_dict(state)
    with pytest.raises(BindingError) as caught:
        train(model, optimizer, iter(data[6:]), freezer)
    return str(caught.value)


def test_processes_that_have_come_apart_are_told_so() -> None:
    for messages in each_together(come_apart, [("older checkpoint",), ("other adapters frozen",)]):
        assert all("have diverged" in message for message in messages)


# ---------------------------------------------------------------- engines that cannot follow


@pytest.mark.parametrize("engine", ["model", "optimizer", "parameters"])
def test_deepspeed_is_refused(engine: str) -> None:
    """Stand-ins: what tells DeepSpeed's engine, its optimizers and its partitioned parameters is their names."""
    kind = type("ZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    model = bert()
    outer: Any = model
    optimizer: Any = adamw(model)
    if engine == "model":
        outer = type("DeepSpeedEngine", (torch.nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
        outer._orig_mod = model
    elif engine == "optimizer":
        optimizer.optimizer = kind()
    else:
        next(model.parameters()).ds_id = 0
    with pytest.raises(BindingError, match=r"DeepSpeed keeps .* use DDP or FSDP2"):
        AdapterFreezer(outer, optimizer, SafeConfig(**SHORT))


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**SHORT))
    model._is_replica = True  # what nn.DataParallel writes on its copies
    with pytest.raises(BindingError, match="torchrun"):
        model(**next(batches(1)))
    freezer.detach()


# ---------------------------------------------------------------- when one dies


def die(rank: int, folder: str) -> None:
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**SHORT))
    for step, batch in enumerate(shares(14, rank, 2), start=1):
        if rank == 1 and step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        train(ddp, optimizer, iter([batch]), freezer)
        if rank == 0:
            jsonio.write_json(Path(folder, "state.json"), freezer.state_dict())


def test_a_process_that_dies_ends_the_others_and_spoils_no_checkpoint(tmp_path: Path) -> None:
    (_, first), (_, second) = outcomes_of(die, str(tmp_path), gloo_seconds=10)
    assert second == "died"
    assert first is not None and "RuntimeError" in first and "hung" not in first
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["step"] == 7, "the last step that all of them made"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**SHORT))
    freezer.load_state_dict(state)
    assert freezer.frozen
