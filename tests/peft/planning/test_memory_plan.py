"""The plan's bytes are those that a real step retains, and its peak is that of a real step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from blocks import retained
from families import LENGTH, ROWS, attention_unknown, family
from oracle import taking_turns
from torch import nn

import safe_peft
from safe_peft import BindingError, ConfigError, MemoryPlan, PlanError, bind, plan_memory
from safe_peft.binding.blocks import transformer_blocks
from safe_peft.planning.fake_model import FakeModel
from safe_peft.planning.inputs import Inputs, inputs_for
from safe_peft.planning.live_bytes import LiveBytes
from safe_peft.planning.retained import RetainedTable
from safe_peft.planning.tracing import live_adapters, trace

FAMILIES = ("bert", "gpt2", "llama")
SETS: dict[str, Callable[[list[str]], list[str]]] = {
    "none": lambda names: [],
    "prefix": lambda names: names[: len(names) // 2],
    "alternating": lambda names: names[::2],
    "all but one": lambda names: names[:3] + names[4:],
}


def names_of(model: nn.Module) -> list[str]:
    return [adapter.name for adapter in live_adapters(model)]


def freeze(model: nn.Module, frozen: list[str], *, fast: bool) -> None:
    for adapter in live_adapters(model):
        if adapter.name in frozen:
            adapter.freeze(keep_dropout=not fast)


@cache
def plan_of(name: str) -> MemoryPlan:
    """Of the family's model while everything trains."""
    return plan_memory(family(name).model(), ROWS, LENGTH)


@cache
def unfrozen(name: str, fast: bool) -> RetainedTable:
    model = family(name).model(p=0.1, lora_dropout=0.1)
    return trace(model, inputs_for(model, ROWS, LENGTH), fast=fast).table


@pytest.mark.parametrize(("name", "which", "fast"), taking_turns(FAMILIES, list(SETS), (False, True)))
def test_retained_bytes_are_those_of_a_real_step(name: str, which: str, fast: bool) -> None:
    one = family(name)
    model = one.model(p=0.1, lora_dropout=0.1)
    frozen = SETS[which](names_of(model))
    planned = trace(model, inputs_for(model, ROWS, LENGTH), frozen=frozen, fast=fast)
    if fast:
        bind(model)
    freeze(model, frozen, fast=fast)
    real = retained(model, one.batch())
    assert planned.retained == planned.table.bytes() == real
    assert unfrozen(name, fast).bytes(frozen) == real, "told from a trace with nothing frozen"
    assert sum(planned.table.by_part().values()) == sum(planned.table.by_block().values()) == real


@pytest.mark.parametrize(
    ("name", "which", "reentrant"), taking_turns(FAMILIES, ["none", "prefix", "alternating"], (False, True))
)
def test_checkpointed_blocks(name: str, which: str, reentrant: bool) -> None:
    model = family(name).model(layers=3, p=0.1, lora_dropout=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    table = trace(model, inputs_for(model, ROWS, LENGTH)).table
    frozen = SETS[which](names_of(model))
    with bind(model):
        freeze(model, frozen, fast=True)
        real = retained(model, family(name).batch())
    # Without values, checkpointing that is not reentrant saves one number more per block.
    assert real <= table.bytes(frozen) <= real + 4 * (not reentrant) * len(table.blocks)
    parts, blocks = table.by_part(), table.by_block(outside="")
    assert sum(parts.get(part, 0) for part in ("block", "recompute")) == sum(blocks.values()) - blocks[""]


def test_what_is_retained_is_known_without_backward() -> None:
    model = family("bert").model(p=0.1, lora_dropout=0.1)
    whole, part = (trace(model, inputs_for(model, ROWS, LENGTH), backward=backward) for backward in (True, False))
    assert part.table == whole.table and part.peak < whole.peak


def test_a_table_never_promises_too_much() -> None:
    model = family("llama").model(p=0.1, lora_dropout=0.1)
    frozen = names_of(model)[:-1]
    planned = trace(model, inputs_for(model, ROWS, LENGTH), frozen=frozen)
    bind(model)
    freeze(model, frozen, fast=True)
    told = unfrozen("llama", True).bytes(frozen)
    assert planned.retained == retained(model, family("llama").batch()) < told, "down_proj keeps the product alone"


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["t5", "vit", "mpnet"])
def test_other_families(name: str, fast: bool) -> None:
    one = family(name)
    model = one.model(p=0.1, lora_dropout=0.1)
    planned = trace(model, inputs_for(model, ROWS, LENGTH), fast=fast)
    if fast:
        bind(model)
    assert planned.retained == retained(model, one.batch())


def test_norms_whose_weights_forbid_to_retain_the_output() -> None:
    one = family("bert")
    model, shell = one.model(), one.model().to("meta")
    with torch.no_grad():
        model.get_submodule("base_model.model.bert.encoder.layer.0.output.LayerNorm").weight[3] = 0.0
    inputs = inputs_for(model, ROWS, LENGTH)
    sizes = [trace(m, inputs).retained for m in (shell, model, FakeModel(model).module)]
    bind(model)
    assert sizes[0] < sizes[1] == sizes[2] == retained(model, one.batch()), "without values the best is assumed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    one = family("llama")
    model = one.model(lora_dropout=0.1, dtype=dtype)
    planned = trace(model, inputs_for(model, ROWS, LENGTH))
    bind(model)
    assert planned.retained + 2 * attention_unknown(dtype) == retained(model, one.batch())


def test_mixed_precision_is_that_around_the_plan() -> None:
    one = family("bert")
    model = one.model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        planned = trace(model, inputs_for(model, ROWS, LENGTH))
        bind(model)
        assert planned.retained == retained(model, one.batch())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_of_different_length_retain_a_mask(name: str) -> None:
    one = family(name)
    model = one.model()
    batch = one.batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, LENGTH // 2 :] = 0
    plain, padded = (inputs_for(model, ROWS, LENGTH, padded=padded) for padded in (False, True))
    assert Inputs.of({**batch, "attention_mask": mask}).padded
    sizes = [trace(model, inputs).retained for inputs in (plain, padded)]
    bind(model)
    assert sizes[1] > sizes[0]
    assert sizes[1] == retained(model, {**batch, "attention_mask": mask})
    assert sizes[0] == retained(model, {**batch, "attention_mask": torch.ones_like(mask)})


@pytest.mark.parametrize(("name", "p"), [("bert", 0.1), ("gpt2", 0.1), ("llama", 0.0)])
def test_blocks_that_recompute(name: str, p: float) -> None:
    one = family(name)
    model = one.model(layers=4, p=p, lora_dropout=p)
    blocks = list(transformer_blocks(model))
    frozen = [n for n in names_of(model) if any(n.startswith(f"{block}.") for block in (blocks[1], blocks[3]))]
    inputs = inputs_for(model, ROWS, LENGTH)
    planned = trace(model, inputs, frozen=frozen, recompute=blocks)
    table = trace(model, inputs).table
    assert table.recomputed(frozen, blocks) == [blocks[1], blocks[3]]
    binding = bind(model)
    freeze(model, frozen, fast=True)
    binding.recompute.update(blocks)
    real = retained(model, one.batch())
    assert planned.retained == table.bytes(frozen, blocks) == real < table.bytes(frozen)
    # Its input: where nothing in it trains, a norm before it keeps its own input, and not what the block reads.
    assert planned.table.by_part()["recompute"] > 0


def test_what_freezing_a_group_frees() -> None:
    model = family("llama").model(lora_dropout=0.1)
    inputs = inputs_for(model, ROWS, LENGTH)
    plan = plan_memory(model, ROWS, LENGTH, frozen=["*.0.mlp.*"])
    assert sorted(name for row in plan.groups for name in row.adapters) == sorted(
        set(names_of(model)) - set(plan.frozen)
    )
    together = [{name.split(".")[-1] for name in row.adapters} for row in plan.groups]
    assert {"q_proj", "k_proj", "v_proj"} in together and {"gate_proj", "up_proj"} in together
    for row in plan.groups[::3]:
        for fast, frees, side in ((True, row.frees, plan.ours), (False, row.stock_frees, plan.stock)):
            again = trace(model, inputs, frozen=[*plan.frozen, *row.adapters], fast=fast)
            assert side.retained - again.retained == frees
    block, frees = plan.blocks[0]
    assert frees == plan.ours.retained - plan_memory(model, ROWS, LENGTH, frozen=[f"{block}.*"]).ours.retained


# ---------------------------------------------------------------- the peak


def allocated(step: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had out at a time, above what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("name", "which", "fast"),
    [*((name, "none", fast) for name in FAMILIES for fast in (False, True)), ("llama", "prefix", True)],
)
def test_the_peak_is_within_a_tenth_of_the_allocators(name: str, which: str, fast: bool) -> None:
    one = family(name)
    model = one.model(p=0.1, lora_dropout=0.1)
    batch = {key: value.repeat(16, *[1] * (value.dim() - 1)) for key, value in one.batch().items()}
    frozen = SETS[which](names_of(model))
    planned = trace(model, Inputs.of(batch), frozen=frozen, fast=fast)
    if fast:
        bind(model)
    freeze(model, frozen, fast=fast)
    model(**batch)  # whatever a first call keeps for good
    with LiveBytes([*model.parameters(), *model.buffers(), *batch.values()]) as live:
        model(**batch).loss.backward()
    model.zero_grad()
    real = allocated(lambda: model(**batch).loss.backward())
    assert planned.peak == pytest.approx(real, rel=0.1)
    assert planned.peak == pytest.approx(live.peak, rel=0.01)


def test_what_a_whole_process_needs() -> None:
    model, plan = family("gpt2").model(), plan_of("gpt2")
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * b.element_size() for b in model.buffers())
    assert (plan.gradients, plan.optimizer, plan.inputs) == (trained, 2 * trained, 2 * ROWS * LENGTH * 8)
    assert plan.parameters == pytest.approx(whole, rel=0.2) and plan.parameters <= whole, "tied weights count once"
    assert plan.ours.peak == plan.parameters + plan.optimizer + plan.inputs + plan.ours.step
    assert plan.ours.step > plan.ours.retained
    assert plan_memory(model, ROWS, LENGTH, optimizer_states=0).optimizer == 0


def test_live_bytes_follow_storages() -> None:
    x = torch.ones(256)
    with LiveBytes([x]) as live:
        y = x * 2
        view = y[:4]
        del y
        assert live.now == 1024
        x.add_(1)
        z = view + 1
        del view
        assert (live.now, live.peak) == (16, 1040)
        del z
    assert live.now == 0


# ---------------------------------------------------------------- what a plan leaves alone


def test_the_model_is_left_as_it_was() -> None:
    model = family("bert").model(p=0.1, lora_dropout=0.1)
    binding = bind(model)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    random = torch.get_rng_state()
    plan_memory(model, ROWS, LENGTH, frozen=0.5)
    assert torch.equal(random, torch.get_rng_state())
    assert [type(module) for module in model.modules()] == kinds and not model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and len(names_of(model)) == 12
    assert not torch.nn.modules.module._global_forward_hooks
    binding.detach()


def test_the_meta_device_gives_the_same() -> None:
    one = family("llama")
    with torch.device("meta"):
        shell = one.model(p=0.1, lora_dropout=0.1)
    assert all(p.is_meta for p in shell.parameters())
    model = one.model(p=0.1, lora_dropout=0.1)
    plans = [plan_memory(m, 64, 32, frozen=0.5) for m in (shell, model)]
    assert plans[0] == plans[1]
    assert all(p.is_meta for p in shell.parameters())


def test_a_binding_changes_nothing_about_the_plan() -> None:
    model = family("gpt2").model()
    bind(model)
    assert plan_memory(nn.parallel.DataParallel(model), ROWS, LENGTH) == plan_of("gpt2")


# ---------------------------------------------------------------- what it looks like, and what it refuses


def test_json_and_text(tmp_path: Any) -> None:
    plan = safe_peft.plan_memory(family("llama").model(layers=3), ROWS, LENGTH, frozen=0.4, recompute=["*.0"])
    assert MemoryPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    text = str(plan)
    assert f"{len(plan.frozen)} of 21 adapters frozen, 1 blocks recomputed" in text
    for part in ("attention", "norms", "model.layers.2", "outside the blocks", "optimizer state", "peak"):
        assert part in text
    assert len(plan.groups_table().splitlines()) == len(plan.groups) + 1
    plan.save_json(tmp_path / "plan.json")
    plan.save_png(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    labels = [bar.get_text() for bar in plan.picture().get_axes()[0].get_yticklabels()]
    assert labels == ["stock", "ours"]
    assert plan.ratio == plan.ours.retained / plan.stock.retained


def test_the_frozen_are_patterns_or_a_share() -> None:
    model = family("bert").model()
    names = names_of(model)
    assert plan_memory(model, ROWS, LENGTH, frozen=0.25).frozen == tuple(names[:3])
    assert plan_memory(model, ROWS, LENGTH, frozen=["*.query", "*.key"]).frozen == tuple(
        name for name in names if name.endswith(("query", "key"))
    )
    for wanted, message in (
        (["*.nowhere"], r"frozen: '\*\.nowhere' matches no adapter; use names such as 'bert"),
        (1.5, "frozen: expected patterns or a share between 0 and 1, got 1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_memory(model, ROWS, LENGTH, frozen=wanted)
    with pytest.raises(ConfigError, match=r"recompute: '7' matches no block"):
        plan_memory(model, ROWS, LENGTH, recompute=["7"])


def test_what_cannot_be_planned_is_named() -> None:
    model = family("llama").model()
    with pytest.raises(PlanError, match="batch_size: missing; pass batch_size"):
        plan_memory(model)
    with pytest.raises(PlanError, match="sequence_length: expected an int of at least 1, got None"):
        plan_memory(model, 2)
    with pytest.raises(PlanError, match="sequence_length: expected at most the model's 64 positions, got 65"):
        plan_memory(model, 2, 65)
    with pytest.raises(PlanError, match="Linear takes inputs that it does not declare"):
        plan_memory(nn.Linear(2, 2), 2, 2)
    with pytest.raises(BindingError, match="no adapter layer"):
        plan_memory(model.unload(), 2, 2)


def test_a_model_that_looks_at_its_data_is_refused() -> None:
    model = family("llama").model()
    model.register_forward_pre_hook(lambda module, args, kwargs: bool(kwargs["input_ids"].sum() > 0), with_kwargs=True)
    with pytest.raises(PlanError, match="does not run without values"):
        plan_memory(model, ROWS, LENGTH)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_batch_may_be_given_and_a_loss_may_be_missing() -> None:
    one = family("bert")
    model = one.model()
    assert plan_memory(model, batch=one.batch()) == plan_of("bert")
    without = {key: value for key, value in one.batch().items() if key != "labels"}
    assert 0 < plan_memory(model, batch=without).ours.retained < plan_of("bert").ours.retained


def test_nothing_trains() -> None:
    model = family("llama").model()
    plan = plan_memory(model, ROWS, LENGTH, frozen=1.0)
    assert plan.stock.retained == plan.ours.retained == plan.gradients == 0
    assert plan.groups == () and plan.ratio == 1.0
