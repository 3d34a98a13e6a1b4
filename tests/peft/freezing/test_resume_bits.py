"""A training that was stopped and goes on is the training that was not: same events, same weights to the last bit."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import ACCUMULATE, CONFIG, STEPS, RawLoop, callback_of, trainer
from tiny import EARLY, adamw, batches, bert, run, train
from torch import Tensor

import safe_peft
from safe_peft import AdapterFreezer, SafeConfig

OPTIONS: list[dict[str, Any]] = [
    {},
    {"score": "gradient_sensitivity", "score_interval": 1},
    {"score": "relative_norm", "freeze_by": "bytes", "target_fraction": 0.6, "recompute": "frozen"},
    {"memory_budget": 34_000, "recompute": "auto", "target_fraction": None, "keep_dropout": True},
]
ids = ["cka", "gradient_sensitivity", "bytes", "budget"]


def config(options: dict[str, Any]) -> SafeConfig:
    return SafeConfig.from_dict({**CONFIG.to_dict(), **options})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "stops"), zip(OPTIONS, ("before on after", "after", "on", "before"), strict=True), ids=ids
)
def test_a_trainer_resumed_before_on_and_after_freezings_ends_with_the_same_bits(
    options: dict[str, Any], stops: str, tmp_path: Path
) -> None:
    whole = trainer(tmp_path, config(options), save_steps=3)
    whole.train()
    ledger = callback_of(whole).freezer.ledger
    steps = {freezing.step for freezing in ledger.freezings}
    assert steps and len(ledger.freezings) < 12
    for step in ({"before": 3, "on": min(steps), "after": 9}[stop] for stop in stops.split()):
        again = trainer(tmp_path / "again", config(options), save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert callback_of(again).freezer.ledger == ledger
        assert same(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize(("options", "stops"), zip(OPTIONS, [(5, 13), (13,), (5,), (13,)], strict=True), ids=ids)
def test_a_custom_loop_resumed_within_an_accumulation_ends_with_the_same_bits(
    options: dict[str, Any], stops: tuple[int, ...], tmp_path: Path
) -> None:
    whole = RawLoop(tmp_path, config(options)).run()
    for micro in stops:
        first = RawLoop(tmp_path / str(micro), config(options)).run(micro)
        first.save()
        again = RawLoop(tmp_path / str(micro), config(options)).resume()
        assert again.freezer.binding.recompute == first.freezer.binding.recompute
        again.run()
        assert again.freezer.state_dict() == whole.freezer.state_dict()
        assert same(again.model.state_dict(), whole.model.state_dict())


def test_evidence_of_a_scoring_under_way_survives(tmp_path: Path) -> None:
    """Between two micro-steps, and between the optimizer's step and the freezer's."""
    micro = CONFIG.score_interval * ACCUMULATE - 1
    loop = RawLoop(tmp_path, CONFIG).run(micro)
    assert any(any(row) for row in loop.freezer.state_dict()["evidence"]["sums"])
    loop = RawLoop(tmp_path).run(micro)
    loop.optimizer.step()
    state = loop.freezer.state_dict()
    assert len(state["evidence"]["importance"]) == 12
    again = RawLoop(tmp_path)
    again.run(micro - 1)
    again.freezer.load_state_dict(state)
    again.freezer.step()
    assert again.freezer.ledger.importance == state["evidence"]["importance"]


def test_the_optimizers_state_may_be_loaded_before_or_after(tmp_path: Path) -> None:
    """What it knew of frozen adapters is gone from it, so its state dict lacks them."""
    first = RawLoop(tmp_path).run(20)
    state, moments = first.freezer.state_dict(), first.optimizer.state_dict()
    frozen = len(first.freezer.frozen)
    assert len(moments["state"]) == 2 + 2 * (12 - frozen) and frozen > 0
    weights = []
    for optimizer_first in (True, False):
        again = RawLoop(tmp_path)
        again.model.load_state_dict(first.model.state_dict())
        if optimizer_first:
            again.optimizer.load_state_dict(copy.deepcopy(moments))
        again.freezer.load_state_dict(state)
        if not optimizer_first:
            again.optimizer.load_state_dict(copy.deepcopy(moments))
        before = {name: value.clone() for name, value in again.model.state_dict().items()}
        again.done = 20
        again.run()
        after = again.model.state_dict()
        held = [name for name in before if any(adapter + "." in name for adapter in first.freezer.frozen)]
        assert len([name for name in held if "lora" in name]) == 2 * frozen
        assert all(torch.equal(before[name], after[name]) for name in held)
        weights.append(after)
    assert same(*weights)


def test_equal_importance_is_ranked_alike_though_json_sorts_names() -> None:
    few = SafeConfig(**{**EARLY, "score_interval": 4, "score": "relative_norm"})

    def still() -> tuple[Any, AdapterFreezer]:
        model = bert()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        return (model, optimizer), AdapterFreezer(model, optimizer, few)

    whole_run, whole = still()
    train(*whole_run, batches(5), whole)
    state = json.loads(json.dumps(whole.state_dict(), sort_keys=True))
    train(*whole_run, batches(11), whole)
    assert set(whole.ledger.scorings[0].importance.values()) == {0.0} and len(whole.frozen) == 9
    run_again, again = still()
    again.load_state_dict(state)
    train(*run_again, batches(11), again)
    assert again.frozen == whole.frozen


@pytest.mark.parametrize("options", OPTIONS[::3], ids=ids[::3])
def test_neither_making_a_freezer_nor_loading_draws_random_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    first = RawLoop(tmp_path, config(options)).run(14)
    again = RawLoop(tmp_path, config(options))
    again.freezer.detach()
    before = torch.get_rng_state()
    freezer = AdapterFreezer(again.model, again.optimizer, config(options))
    freezer.load_state_dict(first.freezer.state_dict())
    freezer.report(memory=True)
    assert torch.equal(torch.get_rng_state(), before)


SHARES = {"warmup": 0.1, "max_warmup": 0.25, "freeze_end": 0.75, "freeze_interval": 2, "score_interval": 1}
SHARES |= {"freeze_by": "adapters"}


def resumed(total: int, more: int, caplog: pytest.LogCaptureFixture) -> tuple[AdapterFreezer, AdapterFreezer]:
    """A training of 16 steps stopped after 8, and one of `total` steps that goes on from there."""
    caplog.clear()
    _, _, first, _ = run(steps=0)
    first.detach()
    freezers = []
    for steps in (16, total):
        model = bert()
        optimizer = adamw(model)
        freezers.append(AdapterFreezer(model, optimizer, SafeConfig(**SHARES), total_steps=steps))
        if steps == 16 and len(freezers) == 1:
            train(model, optimizer, batches(8), freezers[0])
        else:
            freezers[1].load_state_dict(freezers[0].state_dict())
            train(model, optimizer, batches(more), freezers[1])
    return freezers[0], freezers[1]


def test_a_longer_training_keeps_what_froze_and_freezes_the_rest_later(caplog: pytest.LogCaptureFixture) -> None:
    first, longer = resumed(32, 24, caplog)
    assert "saved with 16 total steps, now there are 32: the last freeze event is at step 24" in caplog.text
    assert 0 < len(first.frozen) < 9 and longer.frozen[: len(first.frozen)] == first.frozen
    assert len(longer.frozen) == 9 and longer.ledger.freezings[-1].step == 24
    assert all(freezing.step > 12 for freezing in longer.ledger.freezings[len(first.frozen) :])


def test_a_shorter_training_whose_last_freezing_is_past_freezes_no_more(caplog: pytest.LogCaptureFixture) -> None:
    first, shorter = resumed(10, 2, caplog)
    assert "now there are 10: the last freeze event is at step 8" in caplog.text
    assert shorter.frozen == first.frozen


def test_the_same_length_is_not_worth_a_word(caplog: pytest.LogCaptureFixture) -> None:
    both = resumed(16, 0, caplog)
    assert not caplog.text
    del both  # a freezer that is forgotten in the middle of its training says so


def test_a_trainer_that_trains_longer_goes_on(tmp_path: Path) -> None:
    shares = SafeConfig(**SHARES)
    trainer(tmp_path, shares, max_steps=8, save_steps=4).train()
    longer = trainer(tmp_path, shares, max_steps=STEPS + 4, save_strategy="no")
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    freezer = callback_of(longer).freezer
    assert freezer.schedule.total_steps == 16 and len(freezer.frozen) == 9
    assert max(freezing.step for freezing in freezer.ledger.freezings) == 12


class PulledPlug(Exception):
    pass


class Loader(list[dict[str, Tensor]]):
    """Batches that end in a power cut."""

    def __init__(self, count: int, cut: int | None = None) -> None:
        super().__init__(batches(count))
        self.cut = cut

    def __getitem__(self, place: Any) -> Any:
        def some() -> Iterator[dict[str, Tensor]]:
            for index in range(len(self))[place]:
                if index == self.cut:
                    raise PulledPlug
                yield super(Loader, self).__getitem__(index)

        return some()


def test_the_loop_in_the_docs_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs" / "resume.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "def resume()" in block]

    def script(loader: Loader) -> dict[str, Any]:
        names = {"torch": torch, "safe_peft": safe_peft, "model": bert(lora_dropout=0.1), "loader": loader}
        torch.manual_seed(3)
        exec(compile(block, "block", "exec"), names)
        return names

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = script(Loader(40))
    monkeypatch.chdir(tmp_path / "cut")
    for cut in (5, 27):
        with pytest.raises(PulledPlug):
            script(Loader(40, cut))
    again = script(Loader(40))
    assert again["done"] == 20 and again["freezer"].ledger == whole["freezer"].ledger
    assert same(again["model"].state_dict(), whole["model"].state_dict())
