"""Scores that compare scoring steps, or read the optimizer: formulas in float64, and memory after a restart."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import EARLY, adamw, batches, bert, randomise_adapters, run, train
from torch import Tensor

from safe_kernels import AdapterStatistics
from safe_peft import AdapterFreezer, ConfigError, SafeConfig, ScoreError
from safe_peft.binding.adapters import ScoreInputs
from safe_peft.freezing.scores import find_score, register_score
from safe_peft.planning.retained import MIB

NEW = ["drift", "progress", "realised", "sensitivity", "velocity"]


def score(name: str, evidence: ScoreInputs) -> float:
    return find_score(name).function(evidence)


def pair(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(4, 16, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    return A * scale, B * scale


def statistics(importance: float) -> AdapterStatistics:
    """Sums whose 1 - CKA is this: b = 0, a = 1, c = sin² / (1 - sin²)."""
    sine = 1 - (1 - importance) ** 2
    return AdapterStatistics(torch.tensor([1.0, 0.0, sine / (1 - sine), 8.0], dtype=torch.float64))


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("name", NEW)
def test_without_evidence_importance_is_unknown_and_nothing_is_remembered(name: str) -> None:
    evidence = ScoreInputs()
    assert math.isnan(score(name, evidence)) and not evidence.memory


def test_velocity_is_the_smoothed_change_of_the_root_per_step() -> None:
    memory: dict[str, float] = {}
    found = []
    for step, importance in ((10, 0.01), (14, 0.04), (16, math.nan), (20, 0.09)):
        sums = statistics(0.1).sums * math.nan if math.isnan(importance) else statistics(importance).sums
        found.append(score("velocity", ScoreInputs(AdapterStatistics(sums), step=step, memory=memory)))
    first, second = (0.2 - 0.1) / 4, (0.3 - 0.2) / 6
    assert math.isnan(found[0]) and math.isnan(found[2])
    assert [found[1], found[3]] == pytest.approx([first, 0.5 * first + 0.5 * second], rel=1e-9)


def test_drift_is_the_norm_of_the_difference_of_two_products() -> None:
    (A, B), (dA, dB), W = pair(), pair(1e-6), torch.randn(8, 16, dtype=torch.float64)
    expected = 2.5 * torch.linalg.norm(B @ A - (B - dB) @ (A - dA)) / torch.linalg.norm(W)
    evidence = ScoreInputs(lora_A=A, lora_B=B, update_A=dA, update_B=dB, scaling=-2.5, base_weight=W)
    assert score("drift", evidence) == pytest.approx(float(expected), rel=1e-6)
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in (A, B, dA, dB)]
    A, B, dA, dB = stacked
    expected = torch.linalg.norm(B @ A - (B - dB) @ (A - dA)) / torch.linalg.norm(W)
    evidence = ScoreInputs(lora_A=A, lora_B=B, update_A=dA, update_B=dB, base_weight=W)
    assert score("drift", evidence) == pytest.approx(float(expected), rel=1e-6)
    assert math.isnan(score("drift", ScoreInputs(lora_A=A, lora_B=B, update_A=dA, update_B=dB, base_weight=0 * W)))


def test_sensitivity_is_adaloras_of_the_whole_adapter() -> None:
    memory: dict[str, float] = {}
    mean = spread = 0.0
    for _ in range(3):
        (A, B), (grad_A, grad_B) = pair(), pair()
        now = float(torch.cat([(A * grad_A).flatten(), (B * grad_B).flatten()]).abs().mean())
        mean = 0.85 * mean + 0.15 * now
        spread = 0.85 * spread + 0.15 * abs(now - mean)
        evidence = ScoreInputs(lora_A=A, lora_B=B, grad_A=grad_A, grad_B=grad_B, memory=memory)
        assert score("sensitivity", evidence) == pytest.approx(mean * spread, rel=1e-5)
    evidence = ScoreInputs(lora_A=A, lora_B=B, grad_A=grad_A * math.inf, memory=memory)
    before = dict(memory)
    assert math.isnan(score("sensitivity", evidence)) and memory == before


def moments(m: Tensor, v: Tensor) -> dict[str, Any]:
    return {"step": torch.tensor(3.0), "exp_avg": m, "exp_avg_sq": v}


def test_progress_is_what_of_the_moments_is_not_noise() -> None:
    (mA, mB), (vA, vB) = pair(), pair()
    vA, vB = vA.square(), vB.square()
    states = {"optimizer_state_A": moments(mA, vA), "optimizer_state_B": lambda: moments(mB, vB)}
    expected = 0.0
    for m, v in ((mA, vA), (mB, vB)):
        gain = torch.maximum(m**2 - 0.053 * v, torch.zeros(()))
        expected += float((gain / (v.sqrt() + 1e-8)).sum())
    assert 0 < score("progress", ScoreInputs(**states)) == pytest.approx(expected, rel=1e-12)


class Coded(torch.Tensor):
    """A stand-in for torchao's states of 8 bits."""


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"momentum_buffer": torch.ones(2)},
        {"state1": torch.zeros(2, dtype=torch.uint8), "state2": torch.zeros(2, dtype=torch.uint8)},
        moments(torch.ones(2).to(torch.uint8), torch.ones(2).to(torch.uint8)),
        moments(torch.ones(2).as_subclass(Coded), torch.ones(2).as_subclass(Coded)),
    ],
)
def test_progress_is_unknown_without_adams_moments(state: dict[str, Any]) -> None:
    assert math.isnan(score("progress", ScoreInputs(optimizer_state_A=state, optimizer_state_B=state)))


def test_realised_is_the_loss_that_the_updates_removed() -> None:
    memory: dict[str, float] = {}
    found, expected = [], []
    for _ in range(2):
        (dA, dB), (grad_A, grad_B) = pair(), pair()
        evidence = ScoreInputs(grad_A=grad_A, grad_B=grad_B, update_A=dA, update_B=dB, memory=memory)
        found.append(score("realised", evidence))
        expected.append(-float((dA * grad_A).sum() + (dB * grad_B).sum()))
    assert found == pytest.approx([expected[0], 0.5 * expected[0] + 0.5 * expected[1]], rel=1e-12)


# ---------------------------------------------------------------- what a training gives to a score


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register a score for one test."""
    from safe_peft.freezing import scores

    monkeypatch.setattr(scores, "_SCORES", copy.copy(scores._SCORES))
    return lambda function, **needs: register_score("own", **needs)(function) and None


def sgd(model: Any, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=momentum)


def test_the_update_and_the_gradient_before_it_are_those_of_the_step(registered: Callable[..., None]) -> None:
    seen = []

    def own(evidence: ScoreInputs) -> float:
        parts = evidence.update_A(), evidence.update_B(), evidence.grad_A(), evidence.grad_B()
        seen.append([part.clone() for part in parts if part is not None])
        return 0.0

    registered(own, needs_update=True)
    model = bert()
    randomise_adapters(model)
    optimizer = sgd(model)
    optimizer.register_step_post_hook(lambda *_: [p.grad.zero_() for p in model.parameters() if p.grad is not None])
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"score_interval": 2}, score="own"))
    for batch in batches(2):
        model(**batch).loss.backward()
        optimizer.step()
        assert not freezer._scorer._before, "the copies are dropped"
        optimizer.zero_grad()
        freezer.step()
    assert len(seen) == 12
    for update_A, update_B, grad_A, grad_B in seen:
        torch.testing.assert_close(update_A, -0.5 * grad_A, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(update_B, -0.5 * grad_B, rtol=1e-3, atol=1e-7)
        assert grad_A.abs().sum() > 0


def test_realised_of_plain_descent_is_the_squared_gradient() -> None:
    model = bert()
    randomise_adapters(model)
    optimizer = sgd(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="realised"))
    model(**next(batches(1))).loss.backward()
    squares = [sum(float(p.grad.double().square().sum()) for p in a.parameters()) for a in freezer.adapters]
    optimizer.step()
    freezer.step()
    assert list(freezer.ledger.importance.values()) == pytest.approx([0.5 * square for square in squares], rel=1e-3)


@pytest.mark.parametrize("name", ["realised", "sensitivity"])
def test_a_closure_is_scored_after_its_first_evaluation(name: str) -> None:
    found = []
    for closure in (False, True):
        model, batch = bert(), next(batches(1))
        optimizer = sgd(model)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score=name))

        def evaluate(model: Any = model, batch: Any = batch) -> Tensor:
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        optimizer.step(evaluate if closure else (evaluate() and None))
        freezer.step()
        found.append(freezer.ledger.importance)
    assert found[0] == found[1] and len(found[0]) == 12


def test_the_scales_of_a_fused_optimizer_are_taken_out_of_the_gradient() -> None:
    found = []
    for scale in (1.0, 256.0):
        model = bert()
        randomise_adapters(model)
        optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, fused=True)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="realised"))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        (model(**next(batches(1))).loss * scale).backward()
        optimizer.step()
        freezer.step()
        found.append(freezer.ledger.importance)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_step_that_is_skipped_postpones_the_scoring() -> None:
    model = bert()
    optimizer: Any = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, fused=True)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="realised"))
    for step, infinite in enumerate((1.0, 0.0), start=1):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(infinite)
        model(**next(batches(1))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        assert [scoring.step for scoring in freezer.ledger.scorings] == [2] * (step - 1)
        assert len(freezer._scorer.memory) == 12 * (step - 1)


def test_history_and_step_are_those_of_the_ledger(registered: Callable[..., None]) -> None:
    seen: list[tuple[int, Any]] = []

    def own(evidence: ScoreInputs) -> float:
        seen.append((evidence.step, evidence.history))
        return float(evidence.step)

    registered(own)
    run(steps=6, score="own", score_interval=2, target_fraction=0.0)
    assert seen == [(2, ())] * 12 + [(4, ((2, 2.0),))] * 12 + [(6, ((2, 2.0), (4, 4.0)))] * 12


def test_the_optimizers_state_is_found_among_several_optimizers() -> None:
    model = bert()
    parameters = [p for p in model.parameters() if p.requires_grad]
    both = [torch.optim.AdamW(parameters[:9], lr=3e-3), torch.optim.Adam(parameters[9:], lr=3e-3)]
    freezer = AdapterFreezer(model, both, SafeConfig(**EARLY, score="progress"))
    model(**next(batches(1))).loss.backward()
    for optimizer in both:
        optimizer.step()
    freezer.step()
    assert not freezer.unscored
    adapter = freezer.adapters[0]
    states = [both[0].state[p] | both[1].state.get(p, {}) for p in adapter.pair()]
    expected = score("progress", ScoreInputs(optimizer_state_A=states[0], optimizer_state_B=states[1]))
    assert freezer.ledger.importance[adapter.name] == pytest.approx(expected)


@pytest.mark.parametrize(("name", "reads"), [("drift", "the optimizer's updates"), ("sensitivity", "gradients")])
def test_a_score_that_cannot_be_computed_with_several_optimizers_is_refused(name: str, reads: str) -> None:
    model = bert()
    parameters = [p for p in model.parameters() if p.requires_grad]
    both = [torch.optim.AdamW(parameters[:9], lr=3e-3), torch.optim.AdamW(parameters[9:], lr=3e-3)]
    with pytest.raises(ConfigError, match=f"'{name}' reads {reads} and needs exactly one optimizer, got 2"):
        AdapterFreezer(model, both, SafeConfig(**EARLY, score=name))


def test_a_score_has_statistics_or_the_update() -> None:
    with pytest.raises(ConfigError, match="choose needs_statistics or needs_update"):
        register_score("both", needs_statistics=True, needs_update=True)


# ---------------------------------------------------------------- memory


def test_the_first_scoring_step_of_a_velocity_is_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="safe_peft"):
        _, _, freezer, _ = run(score="velocity")
    first, second = freezer.ledger.scorings[:2]
    assert all(map(math.isnan, first.importance.values())) and all(map(math.isfinite, second.importance.values()))
    assert len(freezer.frozen) == 9
    assert not [record for record in caplog.records if record.name.startswith("safe_peft")]


@pytest.mark.parametrize("name", ["velocity", "sensitivity", "realised", "drift", "progress"])
def test_a_training_that_stops_and_goes_on_scores_as_the_one_that_does_not(name: str) -> None:
    """Stopped twice, and each time another process goes on."""
    options = {**EARLY, "score": name, "score_interval": 3}
    data = list(batches(14))

    def start() -> tuple[Any, Any, AdapterFreezer]:
        model = bert()
        optimizer = adamw(model)
        return model, optimizer, AdapterFreezer(model, optimizer, SafeConfig(**options))

    model, optimizer, whole = start()
    train(model, optimizer, iter(data), whole)
    again, moments, freezer = start()
    for begin, end in ((0, 3), (3, 7), (7, 14)):
        if begin:
            before, state = again, json.loads(json.dumps(freezer.state_dict(), sort_keys=True))
            moments_before = copy.deepcopy(moments.state_dict())
            again, moments, freezer = start()
            again.load_state_dict(before.state_dict())
            freezer.load_state_dict(state)
            moments.load_state_dict(moments_before)
        train(again, moments, iter(data[begin:end]), freezer)
    assert freezer.state_dict() == whole.state_dict()
    assert whole.frozen and all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


def test_memory_between_the_optimizers_step_and_the_freezers_counts_once() -> None:
    found = []
    for restart in (False, True):
        model = bert()
        optimizer = adamw(model)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="sensitivity"))
        train(model, optimizer, batches(1), freezer)
        model(**next(batches(1))).loss.backward()
        optimizer.step()
        if restart:
            state = json.loads(json.dumps(freezer.state_dict()))
            freezer.detach()
            freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="sensitivity"))
            freezer.load_state_dict(state)
        freezer.step()
        found.append((freezer.ledger.importance, freezer._scorer.memory))
    assert found[0] == found[1]


def test_a_state_from_before_scores_had_memory_still_loads() -> None:
    model, _, freezer, _ = run(steps=6, score="relative_norm")
    state = json.loads(json.dumps(freezer.state_dict()))
    freezer.detach()
    del state["memory"], state["config"]["policy"]
    again = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY, score="relative_norm"))
    again.load_state_dict(state)
    assert again.ledger == freezer.ledger and state["version"] == 4


def test_the_saved_state_holds_numbers_and_no_tensors() -> None:
    _, _, freezer, _ = run(steps=8, score="velocity", score_interval=2)
    memory = freezer.state_dict()["memory"]
    assert len(memory) == 12 and {len(numbers) for numbers in memory.values()} == {3}
    assert len(json.dumps(memory)) < MIB // 100


def test_memory_of_anything_but_numbers_is_refused(registered: Callable[..., None]) -> None:
    def own(evidence: ScoreInputs) -> float:
        evidence.memory["A"] = evidence.lora_A()  # type: ignore[assignment]
        return 0.0

    registered(own)
    with pytest.raises(ScoreError, match=r"must be a number, .*, and so must the values of its memory \['A'\]; fix"):
        run(steps=2, score="own")
