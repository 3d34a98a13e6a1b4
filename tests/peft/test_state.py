from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny import EARLY, adamw, batches, bert, run, train

from safe_peft import AdapterFreezer, SafeConfig, StateError


def test_state_goes_through_json_and_gives_the_same_events() -> None:
    data = list(batches(16))
    first, first_optimizer, first_freezer, _ = run(model=bert(lora_dropout=0.1), steps=0)
    train(first, first_optimizer, iter(data[:9]), first_freezer)
    assert 0 < len(first_freezer.frozen) < 9
    saved = json.loads(json.dumps(first_freezer.state_dict(), allow_nan=False))
    weights, moments = copy.deepcopy((first.state_dict(), first_optimizer.state_dict()))
    rng = torch.get_rng_state()
    train(first, first_optimizer, iter(data[9:]), first_freezer)

    again, again_optimizer, again_freezer, _ = run(model=bert(lora_dropout=0.1), steps=0)
    again.load_state_dict(weights)
    again_optimizer.load_state_dict(moments)
    again_freezer.load_state_dict(saved)
    assert again_freezer.frozen == first_freezer.frozen[: len(again_freezer.frozen)]
    assert [a.trainable for a in again_freezer.adapters] == [
        a.name not in again_freezer.frozen for a in again_freezer.adapters
    ]
    assert len(again_optimizer.state) == 2 + 2 * (12 - len(again_freezer.frozen))
    torch.set_rng_state(rng)
    train(again, again_optimizer, iter(data[9:]), again_freezer)
    assert again_freezer.ledger == first_freezer.ledger
    assert len(again_freezer.frozen) == 9


def test_loading_an_earlier_state_thaws_what_froze_later() -> None:
    model = bert(lora_dropout=0.1)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    start = freezer.state_dict()
    train(model, optimizer, batches(16), freezer)
    freezer.load_state_dict(start)
    assert not freezer.frozen and all(adapter.trainable for adapter in freezer.adapters)
    assert all(dropout.p == 0.1 for adapter in freezer.adapters for dropout in adapter.dropouts())


def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    _, _, freezer, _ = run()
    state = freezer.state_dict()
    _, _, other, _ = run(steps=0, score_blocks=2)
    with pytest.raises(StateError, match=r"saved with other options: score_blocks=4 \(here 2\)"):
        other.load_state_dict(state)
    _, _, wider, _ = run(steps=0, model=bert(layers=3))
    with pytest.raises(StateError, match=r"saved for 12 adapters, and here are 18: it lacks \['bert.encoder.layer.2"):
        wider.load_state_dict(state)
    _, _, fresh, _ = run(steps=0)
    for damaged in (
        {},
        {**state, "step": "9"},
        {**state, "version": 99},
        {**state, "ledger": {}},
        {**state, "config": []},
    ):
        with pytest.raises(StateError):
            fresh.load_state_dict(damaged)
    assert not fresh.frozen and fresh.metrics()["safe/step"] == 0.0
