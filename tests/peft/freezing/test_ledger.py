from __future__ import annotations

import json
import math

from safe_peft.files import jsonio
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
    text = json.dumps(jsonio.encode(ledger), allow_nan=False)
    again = jsonio.decode(Ledger, json.loads(text), "ledger")
    assert json.dumps(jsonio.encode(again), allow_nan=False) == text
    assert math.isnan(again.scorings[0].importance["b"])


def test_an_empty_ledger() -> None:
    ledger = Ledger()
    assert (ledger.frozen, ledger.importance, ledger.threshold) == ((), {}, None)
