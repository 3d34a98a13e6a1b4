"""Adapters that no kernel serves: on PEFT's own path they are scored and frozen all the same."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapted import adapted_bert
from adapter_families import ia3, several
from odd import odd
from peft import PeftModel
from tiny import EARLY, adamw, batches, bert, causal_batches, randomise_adapters, run, train
from torch import Tensor, nn
from torch.func import functional_call

from safe_kernels import AdapterStatistics, retention
from safe_peft import AdapterFreezer, SafeConfig, bind, explain
from safe_peft.binding.adapters import Adapter
from safe_peft.binding.class_swap import original_type
from safe_peft.bottleneck import BottleneckLayer

ODD = "lora.Embedding lora.Conv1d lora.Conv1d lora.Conv2d lora.Conv3d lora.ParamWrapper lora.ParamWrapper lora.Linear"


def importance(X: Tensor, Y: Tensor) -> float:
    """1 - CKA as it is defined, in float64, of rows of features."""
    X, Y = (rows.double() - rows.double().mean(0) for rows in (X, Y))
    K, L = X @ X.T, Y @ Y.T
    return float(1 - (K * L).sum() / (K.norm() * L.norm()))


class Oracle:
    """Keeps each layer's features without and with one of its adapters, by running PEFT's layer itself."""

    def __init__(self, freezer: AdapterFreezer) -> None:
        self.features: dict[str, tuple[Tensor, ...]] = {}
        self._deltas: dict[str, Tensor] = {}
        for adapter in freezer.adapters:
            keep = self._keep_expert if "experts" in adapter.name else self._keep
            adapter.layer.register_forward_hook(keep(adapter), with_kwargs=True)

    def _keep(self, adapter: Adapter) -> Any:
        @torch.no_grad()
        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            plain = copy.deepcopy(layer)
            assert type(plain) is original_type(layer)
            plain._forward_hooks.clear()
            plain._active_adapter = [adapter.key]
            Y = plain(*args, **kwargs)
            plain._disable_adapters = True
            self.features[adapter.name] = plain(*args, **kwargs), Y

        return hook

    def _keep_expert(self, adapter: Adapter) -> Any:
        """Two wrappers, one around the other, change one of the experts' parameters each."""
        experts = copy.deepcopy(adapter.layer.get_base_layer())
        own = adapter.layer.parameter_name
        self._deltas[own] = adapter.layer.get_delta_weight(adapter.key).detach().clone()

        @torch.no_grad()
        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            changed = {name: parameter + self._deltas[name] for name, parameter in experts.named_parameters()}
            without = changed | {own: getattr(experts, own)}
            self.features[adapter.name] = tuple(functional_call(experts, w, args) for w in (without, changed))

        return hook

    def importance(self, name: str, dims: int, mask: Tensor | None = None) -> float:
        X, Y = (features.movedim(-dims, -1).flatten(0, -2) for features in self.features[name])
        counts = torch.ones(len(X), dtype=torch.bool) if mask is None else mask.flatten().bool()
        return importance(X[counts], Y[counts])


def scored_once(model: PeftModel, batch: dict[str, Tensor], per_token: int = 1) -> tuple[AdapterFreezer, Oracle]:
    """One block holds all rows, of which a token has so many, and no more: a matrix has as many rows and columns."""
    optimizer = adamw(model)
    options = {**EARLY, "score_blocks": 1, "block_rows": batch["input_ids"].numel() * per_token}
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**options))
    oracle = Oracle(freezer)
    train(model, optimizer, iter([batch]), freezer)
    return freezer, oracle


def test_every_kind_of_layer_is_scored_by_its_features_without_and_with_the_adapter() -> None:
    batch = next(batches(1))
    freezer, oracle = scored_once(odd(), batch, per_token=16)
    dims = {"slide": 2, "grouped": 2, "image": 3, "volume": 4}
    masked = {"words", "experts", "experts.base_layer", "mix", "slide", "grouped"}  # rows are tokens there
    names = [adapter.name for adapter in freezer.adapters]
    assert set(names) == masked | {"image", "volume"}
    expected = {
        name: oracle.importance(name, dims.get(name, 1), batch["attention_mask"] if name in masked else None)
        for name in names
    }
    assert freezer.ledger.importance == pytest.approx(expected, rel=1e-3)
    assert all(value > 1e-6 for value in expected.values()), expected


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=lambda options: next(iter(options)))
def test_variants_of_lora_are_scored_so(options: dict[str, Any]) -> None:
    batch = next(batches(1))
    model = bert(**options)
    randomise_adapters(model)
    freezer, oracle = scored_once(model, batch)
    expected = {a.name: oracle.importance(a.name, 1, batch["attention_mask"]) for a in freezer.adapters}
    assert freezer.ledger.importance == pytest.approx(expected, rel=1e-3)
    assert len(expected) == 12 and all(value > 1e-5 for value in expected.values())


def test_ia3_is_scored_so() -> None:
    batch = next(batches(1))
    freezer, oracle = scored_once(ia3(), batch)
    expected = {a.name: oracle.importance(a.name, 1, batch["attention_mask"]) for a in freezer.adapters}
    assert len(expected) == 6
    assert freezer.ledger.importance == pytest.approx(expected, rel=1e-3)
    assert all(value > 1e-5 for value in expected.values())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_bottleneck_adapters_are_scored_so(placement: str, fast: bool) -> None:
    batch = next(batches(1))
    model = adapted_bert(placement=placement)
    if not fast:
        for layer in model.modules():
            if isinstance(layer, BottleneckLayer):
                layer.bottleneck_up["default"].register_forward_hook(lambda *args: None)
    freezer, oracle = scored_once(model, batch)
    assert {row.path for row in explain(model)} == {"safe_kernels::bottleneck" if fast else "peft"}
    expected = {a.name: oracle.importance(a.name, 1, batch["attention_mask"]) for a in freezer.adapters}
    assert len(expected) == (4 if placement == "houlsby" else 2)
    assert freezer.ledger.importance == pytest.approx(expected, rel=1e-3)
    assert all(value > 1e-5 for value in expected.values())


@pytest.mark.parametrize("score", ["gradient_sensitivity", "progress", "realised"])
def test_ia3_has_scores_of_its_parameters(score: str) -> None:
    model = ia3()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(score=score, threshold=0.0, **EARLY))
    train(model, optimizer, batches(3), freezer)
    assert len(freezer.ledger.importance) == 6 and all(map(math.isfinite, freezer.ledger.importance.values()))


def test_ia3_trains_as_with_stock_peft_until_it_freezes_and_then_retains_less() -> None:
    stock, safe = ia3(), ia3()
    train(stock, adamw(stock), batches(2))
    binding = bind(safe)
    train(safe, adamw(safe), batches(2))
    for one, other in zip(stock.parameters(), safe.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    before = retention.measure(lambda: safe(**next(batches(1))).loss, exclude=safe).bytes
    assert before <= retention.measure(lambda: stock(**next(batches(1))).loss, exclude=stock).bytes
    for adapter in binding.live_adapters():
        adapter.freeze()
    after = retention.measure(lambda: safe(**next(batches(1))).loss, exclude=safe).bytes
    assert after < before / 2
    assert not any(p.requires_grad for name, p in safe.named_parameters() if "ia3_l" in name)


def test_several_active_adapters_are_scored_each_by_itself() -> None:
    batch = next(causal_batches(1))
    freezer, oracle = scored_once(several(), batch)
    assert len(freezer.adapters) == 10
    expected = {a.name: oracle.importance(a.name, 1, batch["attention_mask"]) for a in freezer.adapters}
    assert freezer.ledger.importance == pytest.approx(expected, rel=1e-3)
    for layer in ("0", "1"):
        pair = [f"transformer.h.{layer}.attn.c_attn[{key}]" for key in ("default", "second")]
        assert expected[pair[0]] != pytest.approx(expected[pair[1]], rel=1e-2)


def test_scoring_leaves_outputs_and_random_numbers_as_they_were() -> None:
    def losses(freezing: bool) -> list[float]:
        model = several(lora_dropout=0.3)
        optimizer = adamw(model)
        bind(model)
        options = SafeConfig(**EARLY | {"warmup": 6, "max_warmup": 8})
        freezer = AdapterFreezer(model, optimizer, options) if freezing else None
        return train(model, optimizer, causal_batches(6), freezer)

    assert losses(freezing=True) == losses(freezing=False)


def test_no_row_is_looked_at_between_scorings(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    real = AdapterStatistics.take
    monkeypatch.setattr(AdapterStatistics, "take", lambda self, features: taken.append(self) or real(self, features))
    model = odd()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"score_interval": 4, "warmup": 4}))
    hooks = [len(module._forward_hooks) for module in model.modules()]
    looked = []
    for step, batch in enumerate(batches(8), start=1):
        before = len(taken)
        train(model, optimizer, iter([batch]), freezer)
        looked += [step] if len(taken) > before else []
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert looked == [scoring.step for scoring in freezer.ledger.scorings] == [4, 8]


@pytest.mark.parametrize("score", ["cka", "relative_norm", "gradient_sensitivity"])
def test_they_are_frozen_by_the_schedule(score: str) -> None:
    model, optimizer, freezer, _ = run(model=odd(), score=score, target_fraction=0.75)
    assert sorted(row.kind for row in explain(model) if "modules" not in row.kind) == sorted(ODD.split())
    assert len(freezer.frozen) == 6 and not freezer.unscored
    frozen = [p for a in freezer.adapters if a.name in freezer.frozen for p in a.parameters()]
    before = [p.detach().clone() for p in frozen]
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert any(p.requires_grad for p in frozen), "PEFT thaws"
    train(model, optimizer, batches(3, seed=9), freezer)
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, frozen, strict=True))


def test_the_relative_norm_is_that_of_the_change_of_the_weight() -> None:
    model = odd()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(score="relative_norm", **EARLY))
    freezer.step()
    for adapter in freezer.adapters:
        if adapter.name == "grouped":  # its A reads all channels, so its change is none of a grouped weight
            continue
        delta = adapter.layer.get_delta_weight("default")
        weight = adapter.layer.get_param() if "experts" in adapter.name else adapter.layer.get_base_layer().weight
        assert freezer.ledger.importance[adapter.name] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-4)


def dora() -> PeftModel:
    model = bert(use_dora=True)
    randomise_adapters(model)
    return model


@pytest.mark.parametrize("make", [dora, odd])
def test_frozen_they_retain_what_stock_peft_does_and_nothing_of_their_own(make: Any) -> None:
    batch = next(batches(1))

    def retained(model: nn.Module) -> int:
        return retention.measure(lambda: model(**batch).loss, exclude=tuple(model.parameters())).bytes

    live, stock, ours = make(), make(), make()
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_("lora_" not in name and parameter.requires_grad)
    bind(ours, parts=())
    freezer = AdapterFreezer(ours, adamw(ours), SafeConfig(**EARLY))
    for adapter in freezer.adapters:
        adapter.freeze()
    ours.set_adapter("default")  # thaws them all, as far as PEFT knows
    assert retained(ours) <= retained(stock) < retained(live)
