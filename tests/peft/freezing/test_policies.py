"""Policies: which adapters freeze at one limit in bytes, by importance and by controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import Any

import pytest
from blocks import retained
from tiny import EARLY, adamw, batches, bert, run, train

from safe_peft import AdapterFreezer, ConfigError, PlanError, SafeConfig
from safe_peft.freezing import policies
from safe_peft.freezing.policies import Policy, PolicyInputs, choose_by, policy_names, register_policy
from safe_peft.planning.greedy import fit
from safe_peft.planning.retained import RetainedTable

BYTES = {**EARLY, "freeze_by": "bytes", "score": "relative_norm", "target_fraction": 0.6}


@cache
def table() -> RetainedTable:
    """What a step of a model of three blocks retains."""
    model = bert(layers=3)
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**BYTES))
    model(**next(batches(1)))
    found = freezer.planner._unfrozen()
    freezer.detach()
    return found


def inputs_of(share: float = 0.5, **changes: Any) -> PolicyInputs:
    """A limit that leaves this share of the bytes."""
    names = table().adapters
    importance = {name: 1.0 + index % 5 for index, name in enumerate(names)}
    return PolicyInputs(**{"importance": importance, "table": table(), "limit": int(share * table().bytes())} | changes)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Policy], None]:
    """Register a policy for one test."""
    monkeypatch.setattr(policies, "_POLICIES", copy(policies._POLICIES))
    return lambda function: register_policy("own")(function) and None


def test_the_policies_that_come_with_the_package() -> None:
    assert {"autofreeze", "greedy", "prefix", "random_sets"} <= set(policy_names())


@pytest.mark.parametrize("keep_one", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_greedy_is_the_search_of_the_planner(keep_one: bool, recompute: bool) -> None:
    blocks = [block.name for block in table().blocks] if recompute else []
    inputs = inputs_of(0.3, recompute=blocks, keep_one=keep_one)
    again = "frozen" if recompute else "off"
    expected = fit(table(), inputs.importance, inputs.limit, recompute=again, keep_one=keep_one)
    assert choose_by("greedy", inputs) == list(expected.freeze) != []


@pytest.mark.parametrize("policy", ["random_sets", "prefix"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_controls_stop_at_the_first_set_that_meets_the_limit(policy: str, share: float) -> None:
    inputs = inputs_of(share)
    chosen = choose_by(policy, inputs)
    assert inputs.bytes(chosen) <= inputs.limit < inputs.bytes(chosen[:-1])
    assert choose_by(policy, inputs_of(1.0)) == []


def test_random_sets_differ_by_seed_and_have_equal_bytes_to_within_one_adapter() -> None:
    blocks = [block.name for block in table().blocks]
    inputs = [inputs_of(seed=seed, recompute=blocks) for seed in range(10)]
    sets = [choose_by("random_sets", one) for one in inputs]
    assert len({frozenset(chosen) for chosen in sets}) == 3, "two blocks of three"
    for one, chosen in zip(inputs, sets, strict=True):
        assert one.bytes(chosen) <= one.limit
        assert all(one.bytes([name for name in chosen if name != left]) > one.limit for left in chosen)


def test_random_sets_depend_on_the_seed_alone() -> None:
    importance = dict(reversed(inputs_of().importance.items()))
    assert choose_by("random_sets", inputs_of(seed=3)) == choose_by(
        "random_sets", inputs_of(seed=3, importance=importance)
    )
    chosen = choose_by("random_sets", inputs_of(0.8, seed=3))
    rest = {name: value for name, value in inputs_of().importance.items() if name not in chosen}
    then = choose_by("random_sets", inputs_of(0.2, seed=3, frozen=chosen, importance=rest))
    assert chosen and then and set(chosen).isdisjoint(then)


def test_prefix_freezes_the_lowest_first() -> None:
    chosen = choose_by("prefix", inputs_of(0.4))
    assert chosen == list(table().adapters[: len(chosen)])
    spared = table().adapters[1]
    importance = {name: 1.0 for name in table().adapters if name != spared}
    assert spared not in choose_by("prefix", inputs_of(0.4, importance=importance))


def autofreeze(changes: Sequence[float], **more: Any) -> list[str]:
    """The blocks that freeze if their gradients' norms have changed by these shares."""
    earlier = {name: 2.0 for name in table().adapters}
    importance = {name: 2.0 * (1 - changes[index // 6]) for index, name in enumerate(table().adapters)}
    chosen = choose_by("autofreeze", inputs_of(0.0, **{"importance": importance, "earlier": earlier} | more))
    assert chosen == list(table().adapters[: len(chosen)]) and len(chosen) % 6 == 0
    return [name.split(".")[3] for name in chosen[::6]]


def test_autofreeze_grows_a_prefix_while_the_next_block_hardly_changes() -> None:
    assert autofreeze([0.1, 0.5, 0.2]) == ["0"]
    assert autofreeze([0.1, 0.2, 0.5]) == ["0", "1"]
    assert autofreeze([0.5, 0.1, 0.2]) == []
    assert autofreeze([0.1, 0.2, 0.5], earlier={}) == [], "there is nothing to compare with"
    assert autofreeze([0.1, 0.2, 0.5], limit=table().bytes()) == []


def test_autofreeze_goes_on_above_what_is_frozen() -> None:
    frozen, rest = table().adapters[:6], table().adapters[6:]
    earlier, importance = dict.fromkeys(rest, 2.0), dict.fromkeys(rest[:6], 1.9) | dict.fromkeys(rest[6:], 1.0)
    inputs = inputs_of(0.0, frozen=frozen, importance=importance, earlier=earlier)
    assert choose_by("autofreeze", inputs) == list(rest[:6])


# ---------------------------------------------------------------- in a training


@pytest.mark.parametrize("policy", ["greedy", "random_sets", "prefix", "autofreeze"])
@pytest.mark.parametrize("recompute", ["off", "frozen"])
def test_every_policy_trains_within_the_same_limit(policy: str, recompute: str) -> None:
    model, optimizer, freezer, _ = run(model=bert(layers=3), **BYTES | {"policy": policy, "recompute": recompute})
    full = freezer.planner._unfrozen()
    limit = full.bytes() - int(0.6 * (full.bytes() - full.bytes(full.adapters)))
    if policy != "autofreeze":
        assert freezer.frozen and retained(model, next(batches(1))) <= limit
    train(model, optimizer, batches(1), freezer)


def test_a_state_belongs_to_its_policy() -> None:
    model, optimizer, freezer, _ = run(steps=6, **BYTES | {"policy": "prefix"})
    state = freezer.state_dict()
    freezer.detach()
    again = AdapterFreezer(model, optimizer, SafeConfig(**BYTES))
    with pytest.raises(Exception, match="other options: policy='prefix'"):
        again.load_state_dict(state)


def test_what_cannot_be_planned_has_no_policy() -> None:
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**BYTES | {"policy": "random_sets"}))
    with (
        freezer.planner.suspended(),
        pytest.raises(PlanError, match=r"policy: 'random_sets' cannot be used: .*unknown.*; choose .greedy."),
    ):
        train(model, optimizer, batches(16), freezer)


# ---------------------------------------------------------------- names and options


def test_an_unknown_policy_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"policy: expected one of autofreeze, greedy, .*, got 'luck'"):
        SafeConfig(policy="luck")


@pytest.mark.parametrize(
    "options",
    [{"freeze_by": "adapters"}, {"threshold": 0.1}, {"memory_budget": 9}, {"memory_budget": 9, "target_fraction": 0.5}],
)
def test_only_a_share_of_bytes_has_other_policies(options: dict[str, Any]) -> None:
    assert SafeConfig(**options).policy == "greedy"
    with pytest.raises(ConfigError, match=r'policy: \'prefix\' needs freeze_by="bytes" and a target_fraction'):
        SafeConfig(**options, policy="prefix")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ConfigError, match="'greedy' is already registered"):
        register_policy("greedy")


def test_a_policy_chooses_among_what_may_freeze(registered: Callable[[Policy], None]) -> None:
    registered(lambda inputs: ["classifier"])
    with pytest.raises(ConfigError, match=r"policy 'own': expected names from .* got \['classifier'\]"):
        choose_by("own", inputs_of())


def test_a_policy_of_ones_own_trains(registered: Callable[[Policy], None]) -> None:
    registered(lambda inputs: inputs.until_met(reversed(inputs.table.adapters)))
    _, _, freezer, _ = run(**BYTES | {"policy": "own", "recompute": "frozen"})
    assert list(freezer.frozen) == list(freezer.planner._unfrozen().adapters)[::-1][: len(freezer.frozen)] != []
