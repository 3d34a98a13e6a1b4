"""What PEFT does to adapters that a freezer holds: it goes on, or says what happened."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from pathlib import Path

import forks
import pytest
import torch
from life import gradients
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny import EARLY, adamw, causal_batches, gpt2, randomise_adapters, train

from safe_peft import AdapterFreezer, BindingError, SafeConfig, bind, explain
from safe_peft.binding.class_swap import STATE


def under_way() -> tuple[PeftModel, torch.optim.AdamW, AdapterFreezer]:
    """A training that has frozen some adapters and will freeze more."""
    model = gpt2()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    train(model, optimizer, causal_batches(10), freezer)
    assert 0 < len(freezer.frozen) < 6
    return model, optimizer, freezer


def assert_goes_on(model: PeftModel, optimizer: torch.optim.AdamW, freezer: AdapterFreezer) -> None:
    """The training ends as planned, and what was frozen before never moves."""
    frozen = [p for a in freezer.adapters if a.name in freezer.frozen for p in a.parameters()]
    before = [p.detach().clone() for p in frozen]
    train(model, optimizer, causal_batches(6, seed=2), freezer)
    assert len(freezer.frozen) == 6 and not freezer.unscored
    assert all(torch.equal(old, new) and not new.requires_grad for old, new in zip(before, frozen, strict=True))


def assert_ends(model: PeftModel, freezer: AdapterFreezer, message: str) -> None:
    """It says what happened, tells what it knows, and gives everything back."""
    layers = [adapter.layer for adapter in freezer.adapters]
    for use in (
        freezer.step,
        lambda: freezer.load_state_dict(freezer.state_dict()),
        lambda: freezer.report(memory=True),
    ):
        with pytest.raises(BindingError, match=message):
            use()
    report = freezer.report()
    assert len(report.adapters) == 8 and all(adapter.parameters > 0 for adapter in report.adapters)
    assert freezer.metrics()["safe/frozen"] == len(freezer.frozen) > 0
    freezer.detach()
    assert not any(STATE in module.__dict__ for module in [*model.modules(), *layers])


def test_a_deleted_adapter_is_named() -> None:
    model, _, freezer = under_way()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.delete_adapter("default")
    message = (
        r"transformer\.h\.0\.attn\.c_attn and 7 more adapters: the adapter was deleted .* detach\(\) on this freezer"
    )
    assert_ends(model, freezer, message)


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_an_unloaded_model_is_named(leave: str) -> None:
    model, _, freezer = under_way()
    assert_ends(getattr(model, leave)(), freezer, r"h\.0\.attn\.c_attn and 7 more adapters: no longer in the model")


def test_a_merge_for_a_while_interrupts_scoring_alone() -> None:
    model, optimizer, freezer = under_way()
    frozen = freezer.frozen
    model.merge_adapter()
    with torch.no_grad():
        model(**next(causal_batches(1)))
    freezer.step()
    assert set(freezer.unscored) == {a.name for a in freezer.adapters} - set(frozen) and freezer.frozen == frozen
    model.unmerge_adapter()
    assert_goes_on(model, optimizer, freezer)


def test_hotswap_puts_other_weights_into_adapters_that_stay_frozen(tmp_path: Path) -> None:
    model, optimizer, freezer = under_way()
    other = gpt2()
    randomise_adapters(other)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default")
    model.set_adapter("default")  # in PEFT 0.18 what came in does not train
    assert all(float(p.detach().abs().max()) > 0 for p in freezer.adapters[0].parameters())
    assert_goes_on(model, optimizer, freezer)


def test_preparing_for_hotswap_leaves_the_fast_path_and_keeps_frozen_what_is_frozen() -> None:
    model, _, freezer = under_way()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert {row.reason for row in explain(model)} == {
        "scaling is a tensor (prepared for compiled hotswapping), which the op would treat as a constant"
    }
    assert_goes_on(model, adamw(model), freezer)


def test_adapters_added_later_are_served_and_left_to_the_user() -> None:
    model, optimizer, freezer = under_way()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn", "lm_head"]))
    assert_goes_on(model, optimizer, freezer)
    assert len(freezer.adapters) == 8
    model.set_adapter("second")
    rows = explain(model)
    assert rows["transformer.h.0.attn.c_attn"].reason == ""
    assert rows["lm_head"].reason == "not bound: bind(model) puts it on safe_kernels::lora"
    bind(model)
    assert explain(model)["lm_head"].reason == ""
    assert {name for name in gradients(model) if ".second." not in name} == set()


def test_switching_to_another_adapter_interrupts_scoring_alone() -> None:
    model, optimizer, freezer = under_way()
    frozen = freezer.frozen
    model.add_adapter("second", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    model.set_adapter("second")
    train(model, optimizer, causal_batches(1), freezer)
    assert freezer.frozen == frozen and len(freezer.unscored) == 8 - len(frozen)
    model.set_adapter("default")
    assert_goes_on(model, optimizer, freezer)


def test_a_copy_of_a_model_under_way_is_an_ordinary_one() -> None:
    model, optimizer, freezer = under_way()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(**next(causal_batches(1))).loss
    scorings = len(freezer.state_dict()["evidence"]["sums"])
    for twin in twins:
        assert not any(STATE in module.__dict__ for module in twin.modules())
        assert torch.equal(twin(**next(causal_batches(1))).loss, copy.deepcopy(twin)(**next(causal_batches(1))).loss)
        torch.testing.assert_close(twin(**next(causal_batches(1))).loss, expected)
    assert len(freezer.state_dict()["evidence"]["sums"]) == scorings
    assert_goes_on(model, optimizer, freezer)


def load_without_this_package(pickled: bytes) -> tuple[int, ...]:
    forks.forget("safe_peft", "safe_kernels")
    sys.modules["safe_peft"] = sys.modules["safe_kernels"] = None  # type: ignore[assignment]
    model = torch.load(io.BytesIO(pickled), weights_only=False)
    return tuple(model(torch.tensor([[3, 4]])).logits.shape)


def test_a_pickle_of_a_model_under_way_loads_where_this_package_is_not() -> None:
    model, _, _ = under_way()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    done = forks.call(load_without_this_package, buffer.getvalue())
    assert done.value == (1, 2, 50), done.error
