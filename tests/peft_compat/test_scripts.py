"""PEFT's own behaviour is the oracle: the same script with and without wrapping gives the same."""

from __future__ import annotations

from pathlib import Path

import life_scripts  # noqa: F401  fills the table
import pytest
from life import SCENARIOS, Failure, Scenario, assert_same, assert_same_files, gradients, half_frozen, outcome, start
from life import state as seen

from safe_peft import BindingError, bind
from safe_peft.binding.class_swap import STATE


@pytest.mark.parametrize("script", SCENARIOS, ids=str)
def test_a_script_gives_the_same_on_a_bound_model(script: Scenario, tmp_path: Path) -> None:
    stock, bound = start(), start()
    bind(bound)
    expected = outcome(script, stock, tmp_path / "stock")
    assert script.fails in (None, expected.kind if isinstance(expected, Failure) else "")
    assert_same(outcome(script, bound, tmp_path / "bound"), expected)
    assert_same_files(tmp_path / "bound", tmp_path / "stock")
    assert_same(seen(bound), seen(stock))


@pytest.mark.parametrize("script", [script for script in SCENARIOS if not script.shows_flags], ids=str)
def test_a_script_gives_the_same_with_frozen_adapters_and_thaws_none(script: Scenario, tmp_path: Path) -> None:
    stock, model = start(), start()
    freezer, frozen = half_frozen(model)
    expected = outcome(script, stock, tmp_path / "stock")
    assert_same(outcome(script, model, tmp_path / "frozen"), expected, frozen)
    assert_same_files(tmp_path / "frozen", tmp_path / "stock")
    assert_same(seen(model, flags=False), seen(stock, flags=False))

    layers = [adapter.layer for adapter in freezer.adapters]
    if all(any(layer is module for module in model.modules()) for layer in layers):
        if next(model.parameters()).device.type == "cpu":
            assert not frozen & set(gradients(model))
        freezer.step()
        assert not any(p.requires_grad for name, p in model.named_parameters() if name in frozen)
    else:
        with pytest.raises(BindingError, match="no longer in the model"):
            freezer.step()
    assert freezer.frozen and len(freezer.report().adapters) == len(layers)
    freezer.detach()
    assert not any(STATE in module.__dict__ for module in [*model.modules(), *layers])
