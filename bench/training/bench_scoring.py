"""The cost of scoring: a step that scores every adapter compared with one that scores none, and its share of a run."""

from __future__ import annotations

import pytest
from comparison import compare
from minilm import Step, make_batch, make_model
from pytest_benchmark.fixture import BenchmarkFixture

import safe_peft
from safe_peft.freezing.schedule import is_scoring_step, resolve

TRAINING_STEPS = 160


def default_scorings(steps: int) -> int:
    """Return the number of scoring steps in a training with the default options."""
    schedule = resolve(safe_peft.SafeConfig(), steps)
    return sum(is_scoring_step(schedule, step) for step in range(1, steps + 1))


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_scoring(benchmark: BenchmarkFixture, p: float) -> None:
    batch = make_batch()
    plain, scoring = Step(make_model(p), batch), Step(make_model(p), batch)
    safe_peft.bind(plain.model)
    never_freezes = safe_peft.SafeConfig(target_fraction=0.0, score_interval=1)
    freezer = safe_peft.AdapterFreezer(scoring.model, scoring.optimizer, never_freezes, total_steps=10**6)

    def run() -> None:
        scoring()
        freezer.step()

    ratio = compare(benchmark, run, plain, rounds=20)
    scorings = default_scorings(TRAINING_STEPS)
    # An upper bound: every adapter is scored here, but a training does not score frozen adapters.
    benchmark.extra_info["share_of_training"] = (ratio - 1.0) * scorings / TRAINING_STEPS
    benchmark.extra_info["scorings"] = scorings
    assert len(freezer.ledger.scorings) >= 20
    assert not freezer.unscored
