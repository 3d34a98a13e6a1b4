from __future__ import annotations

import json
import math

import pytest

from safe_peft import StateError
from safe_peft.freezing.ledger import Ledger


def example() -> Ledger:
    ledger = Ledger(warmup_end=3)
    ledger.record_scoring(2, {"a": 0.1, "b": math.nan, "c": 0.3})
    ledger.record_scoring(4, {"a": 0.2, "b": 0.4, "c": 0.3}, threshold=0.25)
    ledger.record_freezing(4, "a", threshold=0.25)
    return ledger


def test_it_knows_who_was_frozen_when_and_with_which_importance() -> None:
    ledger = example()
    assert ledger.frozen == ("a",)
    assert (ledger.freezings[0].step, ledger.freezings[0].importance, ledger.freezings[0].threshold) == (4, 0.2, 0.25)
    assert ledger.importance["b"] == 0.4
    assert ledger.threshold == 0.25


def test_json_round_trip_with_an_unknown_importance() -> None:
    ledger = example()
    text = json.dumps(ledger.to_dict(), allow_nan=False)
    again = Ledger.from_dict(json.loads(text))
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    assert math.isnan(again.scorings[0].importance["b"])


def test_an_adapter_freezes_once() -> None:
    ledger = example()
    with pytest.raises(StateError, match="'a' is frozen already"):
        ledger.record_freezing(5, "a")


def test_steps_do_not_go_back() -> None:
    ledger = example()
    with pytest.raises(StateError, match="step 3 comes after one at step 4"):
        ledger.record_scoring(3, {})


def test_an_empty_ledger() -> None:
    ledger = Ledger()
    assert (ledger.frozen, ledger.importance, ledger.threshold) == ((), {}, None)


FREEZING = {"step": 1, "name": "a", "importance": 0.1, "threshold": None}


@pytest.mark.parametrize(
    ("part", "value"),
    [("warmup_end", "3"), ("scorings", {}), ("freezings", [{"step": 1}]), ("freezings", [FREEZING, FREEZING])],
)
def test_a_damaged_ledger_is_refused(part: str, value: object) -> None:
    with pytest.raises(StateError):
        Ledger.from_dict({**example().to_dict(), part: value})


def test_a_ledger_that_lacks_a_part_is_refused() -> None:
    with pytest.raises(StateError, match="expected warmup_end, scorings and freezings"):
        Ledger.from_dict({"scorings": []})
