from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny import EARLY, adamw, batches, bert, causal_batches, gpt2, run, train
from torch import nn

from safe_kernels import retention
from safe_peft import AdapterFreezer, BindingError, ConfigError, SafeConfig, bind


def weights(freezer: AdapterFreezer, names: tuple[str, ...]) -> list[torch.Tensor]:
    return [p.detach().clone() for a in freezer.adapters if a.name in names for p in a.parameters()]


@pytest.fixture(scope="module")
def trained() -> AdapterFreezer:
    """After a whole training, to be looked at."""
    return run()[2]


@pytest.mark.parametrize(
    ("score", "fraction"),
    [("cka", 0.25), ("cka", 0.9), ("relative_norm", 0.75), ("gradient_sensitivity", 0.75), ("random", 0.75)],
)
def test_the_fraction_is_reached_exactly(score: str, fraction: float) -> None:
    _, _, freezer, _ = run(score=score, target_fraction=fraction)
    assert len(freezer.frozen) == math.floor(fraction * 12 + 0.5)
    assert not freezer.unscored


def test_freezing_follows_the_schedule(trained: AdapterFreezer) -> None:
    start = trained.ledger.warmup_end
    assert start is not None and 2 <= start <= 4
    steps = [freezing.step for freezing in trained.ledger.freezings]
    assert steps == sorted(steps) and steps[-1] == 14 and steps[0] > start
    assert all((step - start) % 2 == 0 or step == 14 for step in steps)
    assert [scoring.step for scoring in trained.ledger.scorings] == list(range(1, 15))


def test_the_least_important_go_first() -> None:
    _, _, freezer, _ = run(score="relative_norm")
    for freezing in freezer.ledger.freezings:
        scoring = next(s for s in reversed(freezer.ledger.scorings) if s.step <= freezing.step)
        gone = {f.name for f in freezer.ledger.freezings if f.step <= freezing.step}
        rest = [value for name, value in scoring.importance.items() if name not in gone]
        assert all(freezing.importance <= value for value in rest)
        assert freezing.threshold is not None and freezing.importance <= freezing.threshold


def test_an_absolute_threshold_freezes_whatever_lies_below_it() -> None:
    _, _, scored, _ = run(score="relative_norm", target_fraction=0.0)
    values = sorted(scored.ledger.importance.values())
    threshold = (values[5] + values[6]) / 2
    _, _, freezer, _ = run(score="relative_norm", threshold=threshold)
    assert freezer.frozen and all(f.importance <= f.threshold <= threshold for f in freezer.ledger.freezings)
    left = [value for name, value in freezer.ledger.importance.items() if name not in freezer.frozen]
    assert all(value > threshold for value in left)


def test_a_frozen_adapter_is_still() -> None:
    model, optimizer, freezer, _ = run(steps=14, model=bert(lora_dropout=0.1))
    frozen = freezer.frozen
    assert len(frozen) == 9
    for adapter in freezer.adapters:
        if adapter.name in frozen:
            assert all(not p.requires_grad and p.grad is None for p in adapter.parameters())
            assert all(p not in optimizer.state for p in adapter.parameters())
            assert [dropout.p for dropout in adapter.dropouts()] == [0.0]
        else:
            assert all(p.requires_grad and p in optimizer.state for p in adapter.parameters())
            assert [dropout.p for dropout in adapter.dropouts()] == [0.1]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 26  # they stay in the groups
    before = weights(freezer, frozen)
    train(model, optimizer, batches(4, seed=9), freezer)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(freezer, frozen), strict=True))


def test_a_frozen_adapter_retains_nothing() -> None:
    model = bert(lora_dropout=0.1)
    batch = next(batches(1))
    _, _, freezer, _ = run(model=model, target_fraction=0.0)
    full = retention.measure(lambda: model(**batch).loss, exclude=tuple(model.parameters())).bytes
    freezer.detach()
    _, _, freezer, _ = run(model=model, target_fraction=1.0)
    assert len(freezer.frozen) == 12
    assert retention.measure(lambda: model(**batch).loss, exclude=tuple(model.parameters())).bytes < 0.7 * full


def test_dropout_may_be_kept() -> None:
    _, _, freezer, _ = run(model=bert(lora_dropout=0.1), keep_dropout=True)
    assert freezer.frozen and all(d.p == 0.1 for adapter in freezer.adapters for d in adapter.dropouts())


def test_never_freeze() -> None:
    _, _, freezer, _ = run(never_freeze=("*.layer.1.*",), target_fraction=0.75)
    assert sorted(freezer.frozen) == sorted(a.name for a in freezer.adapters if ".layer.0." in a.name)
    with pytest.raises(ConfigError, match=r"never_freeze: '\*\.7\.\*' matches no adapter; use names such as 'bert"):
        run(never_freeze=("*.7.*",))


def snapshot(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    dropout = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return [[type(layer) for layer in layers], [set(layer.__dict__) for layer in layers], hooks, dropout,
            [p.requires_grad for p in model.parameters()], list(model.state_dict())]  # fmt: skip


@pytest.mark.parametrize("score", ["cka", "gradient_sensitivity"])
def test_detach_restores_everything(score: str) -> None:
    model = bert(lora_dropout=0.1)
    before = snapshot(model)
    _, optimizer, freezer, _ = run(model=model, score=score)
    assert snapshot(model) != before
    freezer.detach()
    freezer.detach()
    assert snapshot(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert len(freezer.report().freezings) == 9
    for use in (freezer.step, lambda: freezer.load_state_dict(freezer.state_dict())):
        with pytest.raises(BindingError, match="detached"):
            use()


def test_detach_may_leave_the_frozen_ones_frozen() -> None:
    model, _, freezer, _ = run(model=bert(lora_dropout=0.1))
    freezer.detach(keep_frozen=True)
    assert all(type(a.layer) is PeftLinear for a in freezer.adapters)
    assert all(a.trainable == (a.name not in freezer.frozen) for a in freezer.adapters)
    assert all(d.p == 0.0 for a in freezer.adapters if a.name in freezer.frozen for d in a.dropouts())
    assert [a.name for a in AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).adapters] == [
        a.name for a in freezer.adapters if a.name not in freezer.frozen
    ]


def test_an_adapter_the_user_froze_is_left_alone() -> None:
    model = bert()
    for name, parameter in model.named_parameters():
        if ".layer.0." in name:
            parameter.requires_grad_(False)
    _, _, freezer, _ = run(model=model)
    assert len(freezer.adapters) == 6 and len(freezer.frozen) == 5
    freezer.detach()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".layer.0." in name)


def thaw_by_disabling(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def thaw_by_set_adapter(model: PeftModel) -> None:
    model.set_adapter("default")


def thaw_by_requires_grad(model: PeftModel) -> None:
    model.set_requires_grad("default")


@pytest.mark.parametrize("thaw", [thaw_by_disabling, thaw_by_set_adapter, thaw_by_requires_grad])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
def test_what_peft_thaws_does_not_train(thaw: Any, lora: dict[str, Any]) -> None:
    model, optimizer, freezer, _ = run(model=bert(**lora), score="relative_norm")
    frozen = freezer.frozen
    assert len(frozen) == 9
    before = weights(freezer, frozen)
    thaw(model)
    assert any(adapter.trainable for adapter in freezer.adapters if adapter.name in frozen)
    train(model, optimizer, batches(2, seed=5), freezer)
    assert all(torch.equal(old, new) for old, new in zip(before, weights(freezer, frozen), strict=True))
    assert not any(adapter.trainable for adapter in freezer.adapters if adapter.name in frozen)


def test_what_has_no_statistics_is_never_frozen_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    merged = bert()
    merged.merge_adapter()
    _, _, freezer, _ = run(model=merged)
    assert not freezer.frozen
    assert len(freezer.unscored) == 12
    assert sum("12 adapters have no finite importance" in record.message for record in caplog.records) == 1
    assert "safe/importance_min" not in freezer.metrics()


def test_random_is_the_same_for_the_same_seed_whatever_else_draws() -> None:
    events = []
    for noise, seed in ((0, 3), (17, 3), (0, 4)):
        model = bert()
        torch.manual_seed(noise)
        _, _, freezer, _ = run(model=model, score="random", seed=seed)
        events.append(freezer.frozen)
    assert events[0] == events[1] != events[2]


def test_never_freezing_changes_nothing_about_training() -> None:
    stock = bert()
    expected = train(stock, adamw(stock), batches(32))
    _, _, freezer, losses = run(steps=32, target_fraction=0.0, freeze_end=32)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(freezer.ledger.scorings) == 32 and not freezer.frozen


def test_training_while_freezing_equals_stock_peft_frozen_by_hand() -> None:
    _, _, freezer, losses = run(steps=32)
    stock = bert()
    optimizer = adamw(stock)
    expected = []
    for step, batch in enumerate(batches(32), start=1):
        expected += train(stock, optimizer, iter([batch]))
        for name in [freezing.name for freezing in freezer.ledger.freezings if freezing.step == step]:
            layer = stock.get_submodule(f"base_model.model.{name}")
            for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                parameter.requires_grad_(False)
                optimizer.state.pop(parameter)
    assert len(freezer.frozen) == 9
    assert losses == pytest.approx(expected, rel=1e-4)


def test_metrics_are_finite_numbers(trained: AdapterFreezer) -> None:
    metrics = trained.metrics()
    names = ["step", "frozen", "frozen_fraction", "threshold", "importance_min", "importance_median", "importance_max"]
    assert set(metrics) == {f"safe/{name}" for name in names}
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    assert metrics["safe/frozen_fraction"] == 0.75


def test_the_report_is_the_ledger(trained: AdapterFreezer) -> None:
    report = trained.report(retained=[(0, 100), (16, 40)])
    assert [adapter.name for adapter in report.adapters] == [adapter.name for adapter in trained.adapters]
    assert report.adapters[0].parameters == 4 * 32 + 32 * 4
    assert list(report.freezings) == trained.ledger.freezings and list(report.scorings) == trained.ledger.scorings
    assert (report.total_steps, report.retained) == (16, ((0, 100), (16, 40)))
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_last_adapter_is_spared_when_nothing_else_trains() -> None:
    model = gpt2()
    with pytest.raises(ConfigError, match=r"target_fraction: 1\.0 would freeze all 8 adapters"):
        AdapterFreezer(model, adamw(model), SafeConfig(target_fraction=1.0, **EARLY))
    assert not any(hasattr(module, "_safe_state") for module in model.modules())
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(threshold=1e9, **EARLY))
    train(model, optimizer, causal_batches(16), freezer)
    assert len(freezer.frozen) == 7


def test_misuse_is_named() -> None:
    model = bert()
    with pytest.raises(BindingError, match="optimizer: it trains none of this model's adapters"):
        AdapterFreezer(model, adamw(nn.Linear(2, 2)), SafeConfig(**EARLY))
    with pytest.raises(ConfigError, match="total_steps: needed because"):
        AdapterFreezer(model, adamw(model))
    freezer = AdapterFreezer(model, adamw(model), total_steps=100)
    with pytest.raises(BindingError, match="has an AdapterFreezer already"):
        AdapterFreezer(model, adamw(model), total_steps=100)
    freezer.detach()
    bind(model).detach()  # nothing of the failed attempts is left
    model.requires_grad_(False)
    with pytest.raises(BindingError, match="no adapter trains"):
        AdapterFreezer(model, torch.optim.AdamW(model.parameters()), total_steps=100)
