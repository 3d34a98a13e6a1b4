"""Compiled models while adapters freeze: one recompilation per event, none per scoring step, never eager for good."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.utils import compile_regions
from tiny import EARLY, Rows, adamw, bert
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import ROWS, WIDTH, Toy, freezer_of, gradients, pairs, toy
from transformers import Trainer, TrainingArguments

from safe_kernels.retention import measure
from safe_peft import SafeCallback, SafeConfig, bind

SCORED = {4, 8, 12, 14}
"""Steps of `toy.SOON` whose forwards are observed."""


class Counting:
    """A backend that runs graphs as they are, and counts how many there are and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    gc.collect()  # freezers that earlier tests have left in the middle of a scoring step
    torch._dynamo.reset()
    config = torch._dynamo.config
    limits = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(**limits), patch.dict(os.environ):  # transformers leaves word there to compile all that follows
        yield
    assert torch._dynamo.eval_frame._stance.stance == "default"


def whole(model: nn.Module, **options: Any) -> nn.Module:
    return torch.compile(model, **options)


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


def block_by_block(model: nn.Module, **options: Any) -> nn.Module:
    for block in model.base_model.model.blocks:
        block.compile(**options)
    return model


def regions(model: nn.Module, **options: Any) -> nn.Module:
    """Accelerate's own way to compile block by block, which a copy of the model stands around."""
    return compile_regions(model, **options)


WAYS = (whole, in_place, block_by_block, regions)


def train(model: nn.Module, steps: int, backend: Counting | None = None, **options: Any) -> dict[str, Any]:
    """Losses, who froze when, graphs compiled and graphs run, step by step from 1."""
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, **options)
    seen: dict[str, Any] = {"losses": [], "frozen": {}, "graphs": {}, "calls": {}, "freezer": freezer}
    for step, batch in enumerate(pairs(steps), start=1):
        before = (backend.graphs, backend.calls) if backend else (0, 0)
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen["losses"].append(loss.item())
        after = (backend.graphs, backend.calls) if backend else (0, 0)
        seen["graphs"][step], seen["calls"][step] = after[0] - before[0], after[1] - before[1]
        seen["frozen"][step] = freezer.step()
    freezer.detach()
    return seen


@functools.cache
def uncompiled() -> dict[str, Any]:
    return train(toy(), 18)


@pytest.mark.parametrize("way", WAYS)
def test_an_event_recompiles_once_and_a_scoring_not_at_all(way: Callable[..., nn.Module]) -> None:
    expected = uncompiled()
    backend = Counting()
    seen = train(way(toy(), backend=backend, fullgraph=True), 18, backend)
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert seen["frozen"] == expected["frozen"]
    assert sum(map(bool, seen["frozen"].values())) >= 3, "the test needs events"
    assert {step for step, calls in seen["calls"].items() if not calls} == SCORED
    scorings, expected_scorings = (one["freezer"].ledger.scorings for one in (seen, expected))
    for got, scoring in zip(scorings, expected_scorings, strict=True):
        assert got.importance == pytest.approx(scoring.importance, rel=1e-4)
    pending: set[str] = set()
    for step, graphs in seen["graphs"].items():
        if step > 1 and step not in SCORED:
            blocks = {name.split(".")[1] for name in pending}
            # Next to a block that changed, the one above it may have lost the gradient of its input.
            assert graphs <= (2 * len(blocks) if way in (block_by_block, regions) else min(1, len(pending))), step
            pending = set()
        pending |= set(seen["frozen"][step])


@pytest.mark.parametrize("way", [whole, block_by_block])
def test_more_events_than_the_limit_do_not_end_compilation(way: Callable[..., nn.Module]) -> None:
    backend = Counting()
    with torch._dynamo.config.patch(recompile_limit=2):
        seen = train(way(toy(3), backend=backend), 18, backend)
    events = [step for step, names in seen["frozen"].items() if names]
    assert len(events) > 3
    assert all(calls for step, calls in seen["calls"].items() if step not in SCORED)


def test_stock_peft_gains_nothing_after_as_many() -> None:
    """Shows what the test above protects from; torch 2.11 goes on with its first graph, which saves for everything."""
    model, backend = toy(4), Counting()
    compiled = whole(model, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=2):
        for layer, batch in zip([m for m in model.modules() if hasattr(m, "lora_A")], pairs(8), strict=True):
            calls = backend.calls
            compiled(**batch)
            layer.requires_grad_(False)
    assert backend.calls == calls or backend.graphs == 1


def test_a_block_that_did_not_change_is_not_compiled_again() -> None:
    model, backend = toy(4), Counting()
    block_by_block(model, backend=backend, fullgraph=True)
    freezer = freezer_of(model, score="random")
    batch = next(pairs(1))
    model(**batch).backward()
    assert backend.graphs == 2, "of the blocks whose input requires grad, and of the lowest"
    freezer.adapters[4].freeze()
    model(**batch).backward()
    assert backend.graphs == 3
    freezer.detach()


def test_blocks_compiled_one_by_one_are_cut_and_run_again_as_ever() -> None:
    results = []
    for compiled in (False, True):
        model, batch = toy(4), next(pairs(1))
        with bind(model) as binding:
            if compiled:
                block_by_block(model, backend="eager", fullgraph=True)
            for adapter in [binding.live_adapters()[i] for i in (0, 1, 4, 5)]:
                adapter.freeze()
            binding.recompute.add("blocks.2")
            kept = measure(lambda model=model, batch=batch: model(**batch), exclude=[model, *batch.values()])
            kept.output.backward()
            results.append((kept.bytes, gradients(model)))
    (kept_bytes, grads), (own_bytes, own_grads) = results
    # Of one live block the norm keeps its input, and its mean, since a compiler would take today's weights for good.
    assert own_bytes == kept_bytes + 4 * ROWS * WIDTH + 4 * ROWS
    assert own_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(own_grads[name], grad, rtol=1e-4, atol=1e-6)


def test_a_byte_target_sees_the_batches_of_a_compiled_model() -> None:
    backend = Counting()
    options = {"score": "relative_norm", "freeze_by": "bytes", "target_fraction": 0.8}
    expected = train(toy(), 14, **options)
    seen = train(whole(toy(), backend=backend, fullgraph=True), 14, backend, **options)
    assert seen["frozen"] == expected["frozen"]
    assert any(seen["frozen"].values())
    assert backend.calls > 5


def test_any_number_of_rows_takes_one_graph() -> None:
    model, backend = toy(), Counting()
    with bind(model):
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        for rows in (5, 24, 33):
            batch = next(pairs(1, rows=rows))
            torch.testing.assert_close(compiled(**batch), model(**batch))
    assert backend.graphs == 1


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_dropout_in_a_compiled_backward_is_that_of_its_forward(checkpointed: bool, backend: str) -> None:
    model, batch = toy(lora_dropout=0.5), next(pairs(1))
    inner: Toy = model.base_model.model
    if checkpointed:
        inner.around = functools.partial(checkpoint, use_reentrant=False)
    results = []
    with bind(model):
        for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
            torch.manual_seed(3)
            loss = run(**batch)
            loss.backward()
            results.append((loss.detach(), gradients(model)))
    (loss, grads), (own_loss, own_grads) = results
    torch.testing.assert_close(own_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(own_grads[name], grad)


def test_the_users_own_stance_is_set_again() -> None:
    with torch.compiler.set_stance("eager_on_recompile"):
        model = toy()
        freezer = freezer_of(model, score_interval=2)
        freezer.step()
        assert torch._dynamo.eval_frame._stance.stance == "force_eager", "a scoring step is due"
        freezer.step()
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"
        freezer.detach()
        freezer_of(model, score_interval=1).detach()
        assert torch._dynamo.eval_frame._stance.stance == "eager_on_recompile"


def test_a_training_broken_off_in_a_scoring_leaves_nothing_uncompiled() -> None:
    """Several at a time, too: the stance is one for the whole process."""
    freezers = [freezer_of(toy(), score_interval=1) for _ in range(2)]
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    freezers.pop()
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "force_eager", "the other one still looks"
    freezers.clear()
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_trainer_that_compiles(tmp_path: Path) -> None:
    losses, frozen = [], []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        compiling = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=16, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, **compiling
        )
        callback = SafeCallback(SafeConfig(**EARLY | {"score_interval": 4, "freeze_interval": 6}))
        trainer = Trainer(model=bert(1), args=arguments, train_dataset=Rows(128), callbacks=[callback])
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        frozen.append([(event.step, event.name) for event in callback.freezer.ledger.freezings])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert frozen[1] == frozen[0] and len(frozen[0]) >= 4
    events = len({step for step, _ in frozen[0]})
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 < graphs <= 2 + events, "BERT's first forward sets an option that its graph depends on"


@pytest.mark.slow
def test_inductor_goes_on_through_freezings() -> None:
    expected = train(toy(), 14)
    seen = train(whole(toy(), fullgraph=True), 14)
    assert seen["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert seen["frozen"] == expected["frozen"]
    assert sum(map(bool, seen["frozen"].values())) >= 2, "the test needs events"
