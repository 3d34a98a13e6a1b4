from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import EARLY, run

from safe_peft import ConfigError, SafeConfig
from safe_peft.freezing.curves import cubic, curve_value, register_curve
from safe_peft.freezing.schedule import (
    Schedule,
    choose,
    is_freezing_step,
    is_scoring_step,
    is_stable,
    resolve,
    target_count,
)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 40, 160, 1000, 40_000])
def test_the_defaults_give_an_ordered_schedule_for_any_length(total: int) -> None:
    schedule = resolve(SafeConfig(), total)
    assert 0 <= schedule.warmup <= schedule.max_warmup <= schedule.freeze_end <= total
    assert schedule.freeze_interval >= 1 and schedule.score_interval >= 1


def test_shares_and_steps_may_be_mixed() -> None:
    schedule = resolve(SafeConfig(warmup=7, max_warmup=0.3, score_interval=4), 100)
    assert schedule == Schedule(7, 30, 70, 5, 4, 100)


def test_steps_alone_need_no_length() -> None:
    config = SafeConfig(warmup=1, max_warmup=2, freeze_end=9, freeze_interval=2, score_interval=1)
    assert resolve(config) == Schedule(1, 2, 9, 2, 1, None)


def test_a_share_of_an_unknown_length_says_what_to_pass() -> None:
    with pytest.raises(ConfigError, match=r"total_steps: needed because warmup=0\.2 .* pass total_steps="):
        resolve(SafeConfig())


def test_moments_out_of_order_are_named() -> None:
    with pytest.raises(ConfigError, match=r"max_warmup: expected at least warmup \(0\.5: step 50\), got 0\.3"):
        resolve(SafeConfig(warmup=0.5), 100)


def test_the_cubic_curve_is_that_of_the_paper() -> None:
    assert [cubic(step, 10, 20) for step in (0, 10, 20, 99)] == [0.0, 0.0, 1.0, 1.0]
    assert cubic(15, 10, 20) == pytest.approx(1 - 0.5**3)
    assert cubic(5, 5, 5) == 1.0


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_the_curve_rises_within_its_bounds(start: int, length: int, step: int) -> None:
    now, later = cubic(step, start, start + length), cubic(step + 1, start, start + length)
    assert 0.0 <= now <= later <= 1.0


@given(
    st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=1, max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 30),
)
def test_a_fraction_chooses_the_least_important_and_never_too_many(
    values: list[float], fraction: float, share: float, frozen: int
) -> None:
    importance = {str(i): value for i, value in enumerate(values)}
    count = len(values) + frozen
    names, threshold = choose(
        SafeConfig(target_fraction=fraction), importance, adapters=count, frozen=frozen, share=share
    )
    known = sorted(value for value in values if math.isfinite(value))
    assert len(names) == min(len(known), max(0, math.floor(target_count(fraction, count) * share) - frozen))
    assert sorted(importance[name] for name in names) == known[: len(names)]
    assert threshold == (max(importance[name] for name in names) if names else None)


def test_a_threshold_chooses_whatever_lies_at_or_below_it() -> None:
    importance = {"a": 0.0, "b": 0.5, "c": 0.6, "d": math.nan}
    config = SafeConfig(threshold=1.0)
    assert choose(config, importance, adapters=4, frozen=0, share=0.5) == (["a", "b"], 0.5)
    assert choose(config, importance, adapters=4, frozen=0, share=0.0) == (["a"], 0.0)


def test_the_target_is_rounded_and_reached_exactly() -> None:
    assert [target_count(0.75, count) for count in (36, 6, 1)] == [27, 5, 1]
    importance = {str(i): float(i) for i in range(36)}
    names, _ = choose(SafeConfig(), importance, adapters=36, frozen=0, share=1.0)
    assert len(names) == 27


def test_scoring_and_freezing_steps() -> None:
    schedule = Schedule(warmup=4, max_warmup=6, freeze_end=15, freeze_interval=4, score_interval=3)
    assert [step for step in range(1, 30) if is_scoring_step(schedule, step)] == [3, 6, 9, 12, 15]
    assert [step for step in range(1, 30) if is_freezing_step(schedule, 5, step)] == [5, 9, 13, 15]
    assert not any(is_freezing_step(schedule, None, step) for step in range(30))


def test_stability_asks_every_adapter_and_ignores_what_is_unknown() -> None:
    before = {"a": 1.0, "b": 2.0, "c": math.nan}
    assert is_stable(before, {"a": 1.05, "b": 1.9, "c": 5.0}, 0.0500001)
    assert not is_stable(before, {"a": 1.0, "b": 2.2}, 0.05)
    assert not is_stable({}, {"a": 1.0}, 0.05)
    assert not is_stable({"c": math.nan}, {"c": math.nan}, 0.05)
    assert is_stable({"a": 0.0}, {"a": 0.0}, 0.05)


def test_a_curve_of_the_users_own_sets_the_pace() -> None:
    register_curve("late")(lambda step, start, end: 1.0 if step >= end else 0.0)
    _, _, freezer, _ = run(curve="late")
    assert {freezing.step for freezing in freezer.ledger.freezings} == {EARLY["freeze_end"]}
    assert len(freezer.frozen) == 9


def test_a_curve_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"curve: expected one of .*cubic.*, got 'steep'"):
        SafeConfig(curve="steep")
    with pytest.raises(ConfigError, match="curve 'cubic' is already registered"):
        register_curve("cubic")
    register_curve("wild")(lambda step, start, end: 2.0)
    with pytest.raises(ConfigError, match=r"curve 'wild': expected a share between 0 and 1 at step 3, got 2\.0"):
        curve_value("wild", 3, 1, 9)
