"""FSDP2 (`fully_shard`): freezing equals one process, and gradients of what is frozen are not scattered."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ranks import each_together, together
from shares import LONG, LONG_STEPS, OPTIONS, ROWS, STEPS, alone, assert_equal, events, shares
from tiny import adamw, batches, bert, train
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import safe_peft
from safe_peft import AdapterFreezer, BindingError, SafeConfig
from safe_peft.binding.class_swap import SwappedModule
from safe_peft.distributed.fsdp import whole

expected = functools.cache(alone)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """A unit a block, and the root."""
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def digest(model: nn.Module) -> list[float]:
    return [float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters()]


def outcome(model: nn.Module, freezer: AdapterFreezer, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "events": events(freezer), "digest": digest(model)}


def train_sharded(
    rank: int, options: dict[str, Any], config: dict[str, Any], bound_before: bool, steps: int = STEPS
) -> dict[str, Any]:
    model = bert()
    if bound_before:
        safe_peft.bind(model)
    shard(model, **options)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS | config))
    return outcome(model, freezer, train(model, optimizer, shares(steps, rank, 2), freezer))


def test_losses_and_freezings_of_64_steps_equal_one_process() -> None:
    assert_equal(together(train_sharded, {}, LONG, False, LONG_STEPS), alone(LONG_STEPS, LONG))


@pytest.mark.parametrize(
    "scores", [("relative_norm", "gradient_sensitivity", "random"), ("velocity", "drift", "progress", "realised")]
)
def test_losses_and_freezings_equal_one_process(scores: tuple[str, ...]) -> None:
    found = each_together(train_sharded, [({}, {"score": score}, False) for score in scores])
    for score, ranks in zip(scores, found, strict=True):
        assert_equal(ranks, expected(score=score))


def test_a_model_bound_before_it_is_sharded_equals_one_process() -> None:
    for ranks in each_together(train_sharded, [({"reshard_after_forward": on}, {}, True) for on in (True, False)]):
        assert_equal(ranks, expected())


# ---------------------------------------------------------------- with other options


SANDWICH = {"target_fraction": 1 / 3, "never_freeze": ("*.layer.0.*", "*.layer.2.*"), "recompute": "frozen"}


def train_recomputing(rank: int, sharded: bool, reshard: bool = True) -> dict[str, Any]:
    """The middle one of three blocks freezes, and runs again in backward."""
    model = bert(layers=3)
    if sharded:
        shard(model, reshard_after_forward=reshard)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS | SANDWICH))
    data = shares(STEPS, rank, 2) if sharded else batches(STEPS, rows=ROWS)
    result = outcome(model, freezer, train(model, optimizer, data, freezer))
    return {**result, "blocks": list(safe_peft.explain(model).blocks.values())}


def test_blocks_that_run_again_in_backward_equal_one_process() -> None:
    alone = train_recomputing(0, False)
    for ranks in each_together(train_recomputing, [(True, reshard) for reshard in (True, False)]):
        assert ranks[0]["blocks"] == ["trains", "frozen, recomputed in backward", "trains"]
        assert_equal(ranks, alone)


def train_in_bfloat16(rank: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(bert(), mp_policy=policy)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS))
    paths = {layer.path for layer in safe_peft.explain(model)}
    result = outcome(model, freezer, train(model, optimizer, shares(STEPS, rank, 2), freezer))
    return {**result, "paths": paths, "unscored": freezer.unscored}


def test_mixed_precision_freezes_the_same_everywhere() -> None:
    first, second = together(train_in_bfloat16)
    assert first["events"] == second["events"] and len(first["events"]) == 9
    assert first["paths"] == {"safe_kernels::lora"} and first["unscored"] == ()
    assert first["digest"] == second["digest"]
    means = [(one + other) / 2 for one, other in zip(first["losses"], second["losses"], strict=True)]
    assert means == pytest.approx(expected()["losses"], abs=0.05)


# ---------------------------------------------------------------- what is sent, and what is kept


class Scattered(TorchDispatchMode):
    """Counts the numbers that FSDP2 hands to reduce-scatter."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.numbers += args[1].numel()
        return func(*args, **(kwargs or {}))


def train_counting(rank: int) -> tuple[list[tuple[int, int]], bool]:
    model = shard(bert())
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS))
    seen = []
    for batch in shares(STEPS, rank, 2):
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with Scattered() as scattered:
            train(model, optimizer, iter([batch]), freezer)
        seen.append((scattered.numbers, trains))
    return seen, all((p in optimizer.state) == p.requires_grad for p in model.parameters())


def test_gradients_of_what_is_frozen_are_not_scattered_and_its_optimizer_state_is_gone() -> None:
    for seen, state_is_right in together(train_counting):
        assert all(sent == trains for sent, trains in seen)
        assert seen[0][0] == 3650 and seen[-1][0] == 962
        assert state_is_right


def train_without_resharding(rank: int) -> dict[str, Any]:
    """Whole parameters stay on the modules after backward, while the optimizer holds their shards."""
    model = shard(bert())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(False)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS))
    losses = []
    for batch in shares(STEPS, rank, 2):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        model.reshard()  # as an accumulation's last step does
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        losses.append(loss.item())
    state_is_right = all((p in optimizer.state) == p.requires_grad for p in model.parameters())
    return {**outcome(model, freezer, losses), "state_is_right": state_is_right}


def test_parameters_left_whole_after_backward_are_frozen_all_the_same() -> None:
    ranks = together(train_without_resharding)
    assert_equal(ranks, expected())
    assert all(rank["state_is_right"] for rank in ranks)


# ---------------------------------------------------------------- taken off again, and refused


def detach_and_go_on(rank: int, bound_before: bool) -> tuple[list[bool], list[float]]:
    model = bert()
    kinds = [type(module).__name__ for module in model.modules()]
    blocks = list(model.base_model.model.bert.encoder.layer)
    if bound_before:
        binding = safe_peft.bind(model)
    shard(model)
    if not bound_before:
        binding = safe_peft.bind(model)
    losses = train(model, adamw(model), shares(2, rank, 2))
    binding.detach()
    now = [type(module).__name__.removeprefix("FSDP") for module in model.modules()]
    facts = [now == kinds, all(isinstance(module, FSDPModule) for module in [model, *blocks]),
             not any(isinstance(module, SwappedModule) for module in model.modules())]  # fmt: skip
    return facts, losses + train(model, adamw(model), shares(2, rank, 2))


def test_detaching_leaves_the_sharded_model_that_it_was() -> None:
    before, after = each_together(detach_and_go_on, [(True,), (False,)])
    assert before == after and all(all(facts) for facts, _ in before)


def refuse_fsdp1(rank: int) -> str:
    model = bert()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(BindingError) as caught:
        AdapterFreezer(wrapped, adamw(wrapped), SafeConfig(**OPTIONS))
    return str(caught.value)


def test_fsdp1_is_refused() -> None:
    assert all("fully_shard" in message for message in together(refuse_fsdp1))
