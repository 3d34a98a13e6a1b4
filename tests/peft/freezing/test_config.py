from __future__ import annotations

import json
from typing import Any

import pytest

from safe_peft import ConfigError, SafeConfig


def test_the_default_is_three_quarters_of_the_bytes_in_shares_of_the_training() -> None:
    config = SafeConfig()
    assert (config.target_fraction, config.freeze_by, config.threshold) == (0.75, "bytes", None)
    assert all(isinstance(point, float) for point in (config.warmup, config.max_warmup, config.freeze_end))


def test_a_threshold_or_a_budget_takes_the_place_of_the_default_fraction() -> None:
    assert SafeConfig(threshold=1e-3).target_fraction is None
    config = SafeConfig(memory_budget="1GiB")
    assert (config.target_fraction, config.memory_budget) == (None, 2**30)
    assert SafeConfig(memory_budget="1GiB", threshold=0.1).threshold == 0.1


@pytest.mark.parametrize(
    "config",
    [
        SafeConfig(),
        SafeConfig(threshold=0.5, seed=3, keep_dropout=True),
        SafeConfig(memory_budget="1GiB"),
        SafeConfig(score="random", warmup=10, max_warmup=20, freeze_end=100, never_freeze=("*.0.*",), total_steps=120),
    ],
)
def test_json_round_trip(config: SafeConfig) -> None:
    assert SafeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"score": "luck"}, "score: expected one of cka, "),
        ({"target_fraction": 0.5, "threshold": 0.1}, "pass target_fraction=None"),
        ({"target_fraction": 1.5}, "target_fraction: expected a number between 0 and 1"),
        ({"target_fraction": True}, "target_fraction"),
        ({"threshold": -1.0}, "threshold: expected a number >= 0"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": float("inf")}, "threshold"),
        ({"warmup": 1.5}, "warmup: expected optimizer steps"),
        ({"warmup": -1}, "warmup"),
        ({"freeze_interval": "5%"}, "freeze_interval"),
        ({"score_interval": True}, "score_interval"),
        ({"stable_change": -0.1}, "stable_change"),
        ({"total_steps": 0}, "total_steps: expected an integer >= 1"),
        ({"score_blocks": 0}, "score_blocks"),
        ({"block_rows": 1.0}, "block_rows"),
        ({"seed": -1}, "seed"),
        ({"keep_dropout": 1}, "keep_dropout"),
        ({"never_freeze": "*.0.*"}, "never_freeze: expected a tuple"),
        ({"memory_budget": "much"}, "memory_budget: expected a size"),
        ({"freeze_by": "flops"}, "freeze_by: expected one of bytes, adapters"),
        ({"recompute": "always"}, "recompute: expected one of off, frozen, auto"),
        ({"recompute": "auto"}, 'recompute: "auto" needs a memory_budget'),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        SafeConfig(**options)  # type: ignore[arg-type]
    assert named in str(error.value)


def test_the_old_name_of_freeze_by_gives_a_warning() -> None:
    for make in (lambda: SafeConfig(target="adapters"), lambda: SafeConfig.from_dict({"target": "adapters"})):
        with pytest.warns(FutureWarning, match=r"SafeConfig\(target=...\) is called freeze_by now"):
            assert make() == SafeConfig(freeze_by="adapters")


@pytest.mark.parametrize(
    ("options", "by_bytes"),
    [({}, True), ({"freeze_by": "adapters"}, False), ({"threshold": 0.1}, False), ({"memory_budget": 9}, False)],
)
def test_a_share_is_of_bytes_by_default(options: dict[str, Any], by_bytes: bool) -> None:
    assert SafeConfig(**options).by_bytes == by_bytes


def test_an_unknown_option_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no option warm_up; the options are score"):
        SafeConfig.from_dict({"warm_up": 3})


def test_the_papers_own_method_is_one_call() -> None:
    paper = SafeConfig.paper(seed=3)
    assert (paper.score, paper.curve, paper.freeze_by, paper.policy, paper.seed) == (
        "cka",
        "cubic",
        "adapters",
        "greedy",
        3,
    )
