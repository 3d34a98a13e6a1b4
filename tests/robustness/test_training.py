"""Trainings that go wrong: NaN and Inf, exceptions inside a step, calls out of order, absurd sizes and names."""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import EARLY, adamw, batches, bert, train
from torch import nn

from safe_peft import AdapterFreezer, BindingError, ConfigError, FreezeReport, SafeConfig, ScoreError
from safe_peft.report.records import AdapterRecord

NAME = "bert.encoder.layer.0.output.dense"


def begin(**options: Any) -> tuple[Any, torch.optim.Optimizer, AdapterFreezer]:
    model = bert()
    optimizer = adamw(model)
    return model, optimizer, AdapterFreezer(model, optimizer, SafeConfig(**{**EARLY, **options}))


def poison(freezer: AdapterFreezer, value: float) -> nn.Parameter:
    adapter = next(adapter for adapter in freezer.adapters if adapter.name == NAME)
    weight: nn.Parameter = adapter.parameters()[1]
    with torch.no_grad():
        weight[0, 0] = value
    return weight


# ---------------------------------------------------------------- NaN and Inf


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("score", ["cka", "relative_norm"])
def test_an_adapter_without_a_finite_score_stays_trainable_and_is_told_of(
    score: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    model, _, freezer = begin(score=score)
    poison(freezer, value)
    with caplog.at_level(logging.WARNING):
        for batch in batches(16):
            model(**batch)
            freezer.step()
    assert freezer.frozen and NAME not in freezer.frozen and NAME in freezer.unscored
    assert any("lora_B" in record.message and "stay trainable" in record.message for record in caplog.records)


def test_a_training_may_be_stopped_by_it_and_gone_on_with() -> None:
    model, _, freezer = begin(on_nonfinite="raise")
    weight = poison(freezer, float("nan"))
    steps = 0
    with pytest.raises(ScoreError, match=r"NaN or Inf in .*lora_B.*lower the learning rate"):
        for steps, batch in enumerate(batches(16)):  # noqa: B007
            model(**batch)
            freezer.step()
    assert freezer.state_dict()["step"] == steps + 1, "the step that raised was accounted for"
    nn.init.zeros_(weight)
    for batch in batches(16 - steps):
        model(**batch)
        freezer.step()
    assert freezer.frozen and not freezer.unscored
    freezer.detach()


def test_a_young_adapter_has_importance_zero_and_not_nan() -> None:
    model, _, freezer = begin()
    for batch in batches(8):
        model(**batch)
        freezer.step()
    assert set(freezer.ledger.importance.values()) == {0.0}, "lora_B is zero: the layer is what it was"


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (8, 1)])
def test_one_row_or_one_token_is_enough_to_go_on(shape: tuple[int, int]) -> None:
    model, optimizer, freezer = begin()
    losses = train(model, optimizer, batches(16, rows=shape[0], length=max(4, shape[1])), freezer)
    assert all(math.isfinite(loss) for loss in losses) and freezer.ledger.scorings


def test_a_batch_that_is_all_padding_scores_nobody() -> None:
    model, _, freezer = begin(on_nonfinite="raise")
    for batch in batches(4):
        model(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
        freezer.step()
    assert set(freezer.unscored) == {adapter.name for adapter in freezer.adapters}


# ---------------------------------------------------------------- out of order


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails_spoils_no_scoring(error: type[BaseException]) -> None:
    runs = []
    for fails in (False, True):
        model, optimizer, freezer = begin()
        handle = None

        def fail(*_: Any) -> None:
            raise error

        for number, batch in enumerate(batches(16)):
            if fails and number % 2:
                handle = model.get_submodule("base_model.model.classifier").register_forward_pre_hook(fail)
                with pytest.raises(error), freezer.suspended():
                    model(**batch)
                handle.remove()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        runs.append((freezer.frozen, freezer.ledger.importance))
    assert runs[0] == runs[1]


def test_steps_without_a_forward_and_twice_a_step_end_in_no_error() -> None:
    _, _, freezer = begin()
    for _ in range(40):
        freezer.step()
    assert not freezer.frozen and set(freezer.unscored) == {adapter.name for adapter in freezer.adapters}


def test_after_detaching_a_step_says_so() -> None:
    _, _, freezer = begin()
    freezer.detach()
    with pytest.raises(BindingError, match="detached; make a new AdapterFreezer"):
        freezer.step()


def test_a_second_freezer_is_refused_and_the_first_goes_on() -> None:
    model, optimizer, freezer = begin()
    with pytest.raises(BindingError, match="has an AdapterFreezer already"):
        AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    train(model, optimizer, batches(16), freezer)
    assert freezer.frozen


def test_a_step_may_come_from_another_thread() -> None:
    model, optimizer, freezer = begin()
    for batch in batches(16):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        thread = threading.Thread(target=freezer.step)
        thread.start()
        thread.join()
    assert freezer.frozen


# ---------------------------------------------------------------- absurd sizes, names and options


def test_hundreds_of_adapters_with_names_of_any_kind() -> None:
    torch.manual_seed(0)
    names = [f"läyer {index} <b>'\"&\n{'x' * 60}" for index in range(400)]
    base = nn.Module()
    base.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    base.forward = lambda x: sum(layer(x) for layer in base.layers.values())  # type: ignore[method-assign]
    model = get_peft_model(base, LoraConfig(r=1, target_modules=r"(?s).*layers\..*"))
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    for _ in range(16):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    assert len(freezer.frozen) == 300


def test_a_report_escapes_what_a_name_may_hold(tmp_path: Any) -> None:
    name = "<script>alert(1)</script>\n\N{SNOWMAN}"
    report = FreezeReport(name, {"score": "cka"}, 4, (AdapterRecord(name, 8),))
    report.save_html(tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    report.save_json(tmp_path / "report.json")
    assert FreezeReport.load(tmp_path / "report.json") == report


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(sorted(SafeConfig().to_dict())), VALUES, max_size=4))
def test_any_options_are_taken_or_refused_by_name(options: dict[str, Any]) -> None:
    try:
        config = SafeConfig.from_dict(options)
    except ConfigError as error:
        assert any(name in str(error) for name in options), error
        return
    assert SafeConfig.from_dict(config.to_dict()) == config
    try:
        begin_and_end(config)
    except ConfigError as error:
        assert str(error)


def begin_and_end(config: SafeConfig) -> None:
    freezer = AdapterFreezer(MODEL, OPTIMIZER, config, total_steps=20)
    try:
        freezer.step()
    finally:
        freezer.detach()


MODEL = bert(layers=1)
OPTIMIZER = adamw(MODEL)
