"""DDP without `find_unused_parameters`: freezing equals one process, and what is frozen is not sent."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ranks import each_together, together
from shares import LONG, LONG_STEPS, OPTIONS, STEPS, alone, assert_equal, digest, events, shares
from tiny import adamw, batches, bert, train
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from safe_peft import AdapterFreezer, BindingError, SafeConfig

expected = functools.cache(alone)
expected_long = functools.cache(functools.partial(alone, LONG_STEPS, LONG))


def start(ddp: nn.Module, model: nn.Module, **options: Any) -> tuple[torch.optim.AdamW, AdapterFreezer]:
    optimizer = adamw(model)
    return optimizer, AdapterFreezer(ddp, optimizer, SafeConfig(**OPTIONS | options))


def outcome(model: nn.Module, freezer: AdapterFreezer, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "events": events(freezer), "digest": digest(model)}


# ---------------------------------------------------------------- equal to one process


def train_wrapped(
    rank: int, options: dict[str, Any], inner: bool = False, steps: int = STEPS, schedule: dict[str, Any] = OPTIONS
) -> dict[str, Any]:
    model = bert()
    ddp = DistributedDataParallel(model, **options)
    optimizer, freezer = start(model if inner else ddp, model, **schedule)
    return outcome(model, freezer, train(ddp, optimizer, shares(steps, rank, 2), freezer))


def test_losses_and_freezings_of_64_steps_equal_one_process() -> None:
    assert_equal(together(train_wrapped, {}, False, LONG_STEPS, LONG), expected_long())


def test_losses_and_freezings_equal_one_process() -> None:
    """With other options of DDP, and if the freezer is given the inner model."""
    options = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view")
    for ranks in each_together(train_wrapped, [*(({name: True},) for name in options), ({}, True)]):
        assert_equal(ranks, expected())


def train_accumulating(rank: int) -> dict[str, Any]:
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer, freezer = start(ddp, model)
    losses = []
    for batch in shares(STEPS, rank, 2):
        first, second = ({name: column.chunk(2)[part] for name, column in batch.items()} for part in (0, 1))
        with ddp.no_sync():
            loss = ddp(**first).loss / 2
            loss.backward()
        other = ddp(**second).loss / 2
        other.backward()
        optimizer.step()
        freezer.step()  # before zero_grad, which keeps the tensors
        optimizer.zero_grad(set_to_none=False)
        losses.append(loss.item() + other.item())
    return outcome(model, freezer, losses)


def test_gradients_accumulated_under_no_sync_equal_one_process() -> None:
    assert_equal(together(train_accumulating), expected())


# ---------------------------------------------------------------- what is sent


def count_bytes(ddp: DistributedDataParallel) -> list[int]:
    """The bytes of every bucket that is sent from now on."""
    sent: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def] # DDP reads annotations, and wants classes, not strings
        sent.append(bucket.buffer().nbytes)
        flat = bucket.buffer().div_(torch.distributed.get_world_size())
        return torch.distributed.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    return sent


def train_counting(rank: int) -> list[tuple[int, int]]:
    model = bert()
    ddp = DistributedDataParallel(model)
    sent = count_bytes(ddp)
    optimizer, freezer = start(ddp, model)
    traffic = []
    for batch in shares(STEPS, rank, 2):
        sent.clear()
        trains = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        train(ddp, optimizer, iter([batch]), freezer)
        traffic.append((sum(sent), trains))
    sent.clear()
    freezer.detach()
    train(ddp, optimizer, shares(1, rank, 2))
    return [*traffic, (sum(sent), sum(p.nbytes for p in model.parameters() if p.requires_grad))]


def test_every_step_sends_the_gradients_of_what_trains_and_of_nothing_else() -> None:
    for traffic in together(train_counting):
        assert all(sent == trains for sent, trains in traffic)
        sizes = [sent for sent, _ in traffic]
        assert sizes[0] == sizes[-1] == 14600, "detached, everything trains and is sent again"
        assert sizes[-2] == 3848 and len(set(sizes)) == 4, "fewer with every freezing"


def train_with_hook(rank: int, name: str) -> dict[str, Any]:
    model = bert()
    ddp = DistributedDataParallel(model)
    if name == "power_sgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=3)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    else:
        ddp._register_builtin_comm_hook(torch.distributed.BuiltinCommHookType.FP16_COMPRESS)
    optimizer, freezer = start(ddp, model, **LONG)
    result = outcome(model, freezer, train(ddp, optimizer, shares(LONG_STEPS, rank, 2), freezer))
    return {**result, "hook": ddp._get_ddp_logging_data()["comm_hook"]}


@pytest.mark.parametrize(
    ("name", "hook"), [("power_sgd", "powerSGD_hook"), ("fp16", "BuiltinCommHookType.FP16_COMPRESS")]
)
def test_a_communication_hook_stays_where_it_was(name: str, hook: str) -> None:
    first, second = together(train_with_hook, name)
    assert first["hook"] == second["hook"] == hook
    assert first["events"] == second["events"] and first["digest"] == second["digest"]
    means = [(one + other) / 2 for one, other in zip(first["losses"], second["losses"], strict=True)]
    differences = [abs(mean - loss) for mean, loss in zip(means, expected_long()["losses"], strict=True)]
    assert 2e-6 < max(differences) < 0.1, "it compresses, and still trains"


# ---------------------------------------------------------------- resumed, and refused


def resume(
    rank: int, inner: bool, options: dict[str, Any], compiled: bool = False, at: int = 9, steps: int = STEPS
) -> dict[str, Any]:
    """Half a run, then a new model, DDP and freezer that are given the state of the first."""
    data = list(shares(steps, rank, 2))
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer, freezer = start(ddp, model)
    losses = train(ddp, optimizer, iter(data[:at]), freezer)
    saved = model.state_dict(), optimizer.state_dict(), freezer.state_dict()
    model = bert()
    model.load_state_dict(saved[0])
    ddp = DistributedDataParallel(model, **options)
    outer = torch.compile(ddp, backend="eager") if compiled else ddp
    optimizer, freezer = start(model if inner else outer, model)
    optimizer.load_state_dict(saved[1])
    freezer.load_state_dict(saved[2])
    return outcome(model, freezer, losses + train(outer, optimizer, iter(data[at:]), freezer))


@pytest.mark.parametrize("inner", [False, True])
def test_a_resumed_run_equals_one_process(inner: bool) -> None:
    """Given the inner model, adapters freeze again before any forward shows the wrapper."""
    options: list[dict[str, bool]] = [{}, {"static_graph": True}, {"find_unused_parameters": True}]
    for ranks in each_together(resume, [(inner, one) for one in options]):
        assert_equal(ranks, expected())


def test_a_resumed_run_whose_freezer_is_not_given_the_compiled_wrapper_equals_one_process() -> None:
    """The step after the restart scores nothing, so that compiled code would run, and show no wrapper."""
    steps = 11  # one more freeze event; each compiles anew
    assert_equal(together(resume, True, {}, True, 8, steps), alone(steps))


def refuse(rank: int) -> list[str]:
    found = []
    policy = torch.nn.parallel.distributed._MixedPrecision(param_dtype=torch.bfloat16)
    for option in ("mixed_precision", "delay"):
        model, options = bert(), {}
        if option == "delay":
            named = [pair for pair in model.named_parameters() if "lora_A" in pair[0]]
            hook = next(p for name, p in model.named_parameters() if "classifier" in name and p.requires_grad)
            options = {"delay_all_reduce_named_params": named, "param_to_hook_all_reduce": hook}
        with pytest.raises(BindingError) as caught:
            ddp = DistributedDataParallel(model, **options)
            if option == "mixed_precision":
                ddp.mixed_precision = policy  # afterwards: it makes a stream, which takes a driver
            start(ddp, model)
        assert not any(hasattr(module, "_safe_state") for module in model.modules())
        found.append(str(caught.value))
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer, freezer = start(ddp, model)
    with pytest.raises(BindingError) as caught, ddp.join():
        train(ddp, optimizer, shares(2, rank, 2), freezer)
    return [*found, str(caught.value)]


def test_what_ddp_cannot_follow_is_refused() -> None:
    for mixed, delayed, join in together(refuse):
        assert "mixed_precision" in mixed and "torch.autocast" in mixed
        assert "delay_all_reduce_named_params" in delayed
        assert "join()" in join and "DistributedSampler" in join


def train_alone_in_a_group(rank: int) -> list[list[Any]]:
    model = bert()
    ddp = DistributedDataParallel(model)
    optimizer, freezer = start(ddp, model)
    train(ddp, optimizer, batches(STEPS), freezer)
    return events(freezer)


def test_a_single_process_under_ddp_freezes_as_without_it() -> None:
    assert together(train_alone_in_a_group, world=1) == [expected()["events"]]
