"""Arguments of the public calls: whatever is passed is taken, or refused with an error of ours that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import EARLY, adamw, bert
from torch import nn

from safe_peft import (
    AdapterFreezer,
    ConfigError,
    FreezeReport,
    SafeCallback,
    SafeConfig,
    SafeError,
    bind,
    explain,
    last_checkpoint,
    plan_memory,
)

MODEL = bert(layers=1)
OPTIMIZER = adamw(MODEL)
HUGE = 10**5000  # Python does not even print it


def freezer(**arguments: Any) -> AdapterFreezer:
    return AdapterFreezer(**{"model": MODEL, "optimizer": OPTIMIZER, "config": SafeConfig(**EARLY), **arguments})


def refused(call: Callable[[], Any], *named: str) -> None:
    with pytest.raises(SafeError) as caught:
        call()
    assert all(name in str(caught.value) for name in named), caught.value


@pytest.mark.parametrize("call", [bind, explain, lambda model: plan_memory(model, 2, 4), lambda m: freezer(model=m)])
@pytest.mark.parametrize("model", [None, 3, "model", bert, [MODEL], {"model": MODEL}], ids=lambda m: type(m).__name__)
def test_what_is_no_model(call: Callable[[Any], Any], model: Any) -> None:
    refused(lambda: call(model), "model: expected a torch.nn.Module, got")


@pytest.mark.parametrize("optimizer", [None, 3, "adam", [], [OPTIMIZER, None], b"x"], ids=str)
def test_what_is_no_optimizer(optimizer: Any) -> None:
    refused(lambda: freezer(optimizer=optimizer), "optimizer: ")


@pytest.mark.parametrize("several", [[OPTIMIZER], {OPTIMIZER}, iter([OPTIMIZER])], ids=lambda s: type(s).__name__)
def test_optimizers_in_any_collection(several: Any) -> None:
    freezer(optimizer=several).detach()


STEPS = [0, -1, 1.5, 16.0, "10", True, float("nan"), HUGE, [3], torch.ones(2)]


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: str(type(steps)))
def test_steps_that_are_none(steps: Any) -> None:
    refused(lambda: freezer(total_steps=steps), "total_steps: expected an integer")
    if type(steps) is not int or steps != 0:
        refused(lambda: freezer(first_step=steps), "first_step: expected an integer")
    if type(steps) is int:
        refused(lambda: SafeConfig(total_steps=steps, block_rows=steps), "expected an integer")


def test_steps_of_numpys_are_saved_as_pythons(tmp_path: Path) -> None:
    made = freezer(config={"score": "cka"}, total_steps=np.int64(20), first_step=np.int32(2))
    made.save(tmp_path / "state.json")
    made.load(tmp_path / "state.json")
    made.detach()


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)), st.booleans())
@example(2**53, False)
@example(2**53 + 1, False)
@example(2**53, True)
def test_any_steps_are_taken_for_good_or_refused(steps: Any, first: bool) -> None:
    name = "first_step" if first else "total_steps"
    try:
        made = freezer(**{name: steps})
    except ConfigError as error:
        assert name in str(error)
        return
    try:
        made.load_state_dict(made.state_dict())
    finally:
        made.detach()


@pytest.mark.parametrize("config", [3, "x", ["cka"]], ids=str)
def test_options_that_are_none(config: Any) -> None:
    refused(lambda: freezer(config=config), "config: expected a SafeConfig or a dict")
    refused(lambda: SafeCallback(config), "config: expected a SafeConfig or a dict")
    refused(lambda: SafeCallback().attach(config), "trainer: expected a transformers.Trainer, got")


@pytest.mark.parametrize("parts", [None, 3, "norms", ["norm"], [3]], ids=str)
def test_parts_that_are_none(parts: Any) -> None:
    refused(lambda: bind(MODEL, parts=parts), "parts: expected a list of some of")


@pytest.mark.parametrize("path", [None, 3, b"x"], ids=repr)
def test_paths_that_are_none(path: Any) -> None:
    made = freezer()
    report = made.report()
    for call in (made.save, made.load, FreezeReport.load, report.save_json, report.save_html, report.save_png):
        refused(lambda call=call: call(path), "path: expected a path")
    refused(lambda: last_checkpoint(path), "output_dir: expected a path")
    refused(lambda: made.save("state.json", files=[path]), "files: expected a path")
    made.detach()


@pytest.mark.parametrize("files", [3, "optimizer.pt", None], ids=repr)
def test_files_that_are_none(files: Any, tmp_path: Path) -> None:
    made = freezer()
    refused(lambda: made.save(tmp_path / "state.json", files=files), "files: expected paths")
    made.detach()
    assert not list(tmp_path.iterdir())


def test_reports_that_cannot_be_written_where_they_are_to_go(tmp_path: Path) -> None:
    made = freezer()
    report, place = made.report(), tmp_path / "file" / "report"
    (tmp_path / "file").touch()
    for save in (report.save_json, report.save_html, report.save_png, made.save):
        refused(lambda save=save: save(place), f"{place} cannot be written: ")
    made.detach()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 3}, "batch: expected a model's arguments by name"),
        ({"batch": [torch.ones(1)]}, "batch: expected a model's arguments by name"),
        ({"frozen": [3]}, "frozen: expected shell patterns, got 3"),
        ({"frozen": None}, "frozen: expected shell patterns, got None"),
        ({"recompute": object}, "recompute: expected shell patterns"),
    ],
    ids=str,
)
def test_plans_of_nonsense(options: dict[str, Any], named: str) -> None:
    refused(lambda: plan_memory(MODEL, 2, 4, **options), named)


def test_the_model_is_as_it_was_before_all_this() -> None:
    assert [type(module) for module in MODEL.modules()] == [type(module) for module in bert(layers=1).modules()]
    assert isinstance(MODEL, nn.Module) and not MODEL._forward_pre_hooks
