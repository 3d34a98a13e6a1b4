"""DoRA on the fast path, compared with stock PEFT."""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from blocks import error
from families import family
from one_layer import (
    ADAPTERS,
    D_OUT,
    ROWS,
    One,
    assert_compiled,
    assert_pefts_if_merged_or_disabled,
    assert_stocks,
    batch,
    layer_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from tiny import adamw, batches, bert, randomise_adapters, run, train

from safe_kernels import AdapterStatistics, RowBlocks
from safe_kernels.retention import measure
from safe_peft import bind, explain, plan_memory
from safe_peft.binding.adapters.lora import refusal

NAMES = ("x", "bias", "lora_A", "lora_B", "magnitude")
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(6)))
RANK = 4


def one(kind: str = "fp32", **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    dtype, upcast = ADAPTERS[kind]
    config = LoraConfig(r=RANK, lora_alpha=8, target_modules=["linear"], use_dora=True, **lora)
    model = get_peft_model(One().to(dtype), config, autocast_adapter_dtype=upcast).train()
    randomise_adapters(model)
    with torch.no_grad():
        layer_of(model).lora_magnitude_vector["default"].weight.mul_(1.1)
    return model


def require(model: PeftModel, names: tuple[str, ...]) -> None:
    layer = layer_of(model)
    layer.base_layer.bias.requires_grad_("bias" in names)
    layer.lora_A.requires_grad_("lora_A" in names)
    layer.lora_B.requires_grad_("lora_B" in names)
    layer.lora_magnitude_vector.requires_grad_("magnitude" in names)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_output_and_gradients_are_stock_pefts(fast_calls: list[Any], kind: str, names: tuple[str, ...]) -> None:
    model = one(kind)
    require(model, names)
    assert_stocks(model, batch(ADAPTERS[kind][0]).requires_grad_("x" in names), fast_calls)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(fast_calls: list[Any], kind: str, input_dtype: torch.dtype) -> None:
    model = one(kind)
    require(model, NAMES)
    assert_stocks(model, batch(input_dtype).requires_grad_(), fast_calls, autocast=True)


def test_a_layer_in_evaluation_does_not_drop_whatever_its_dropout_is_set_to(fast_calls: list[Any]) -> None:
    """At p = 1 PEFT's adapter gets zeros, so that its result is known."""
    model, x = one(lora_dropout=0.5), batch()
    layer, dropout = layer_of(model), layer_of(model).lora_dropout["default"]
    dropout.p = 1.0
    with bind(model):
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.training = False
        expected = type(layer).original.forward(layer, x)
        assert error(layer(x), expected) < 1e-6 < error(layer.base_layer(x), expected)
        layer.training, dropout.training = True, False
        assert error(layer(x), expected) < 1e-6
    assert len(fast_calls) == 3


def test_dropout_drops_what_it_says(fast_calls: list[Any]) -> None:
    """The mean over many masks is the output without dropout."""
    model, x = one(lora_dropout=0.5), batch()
    expected = model.eval()(x)
    with bind(model.train()), torch.no_grad():
        outs = torch.stack([model(x) for _ in range(400)])
    spread = outs.std(0).max()
    assert spread > 0.01
    assert (outs.mean(0) - expected).abs().max() < 6 * spread / 20


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_retained_bytes(kind: str, p: float) -> None:
    """x once, with dropout 16 bytes, and the norm; frozen with dropout off, the norm only."""
    stock, model = one(kind, lora_dropout=p), one(kind, lora_dropout=p)
    x = batch(ADAPTERS[kind][0]).requires_grad_()
    norm = D_OUT * layer_of(model).lora_A["default"].weight.element_size()
    with bind(model):
        live, expected = (measure(lambda m=m: m(x), exclude=m).bytes for m in (model, stock))
        assert live == x.nbytes + norm + (16 if p else 0) <= 0.5 * expected
        for each in (model, stock):
            require(each, ())
        layer_of(model).lora_dropout["default"].p = 0.0  # as `freeze` does
        frozen, expected = (measure(lambda m=m: m(x), exclude=m).bytes for m in (model, stock))
        assert frozen == norm <= expected


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_whole_model_retains_at_most_half(name: str, p: float) -> None:
    models = [family(name).model(use_dora=True, lora_dropout=p) for _ in range(2)]
    inputs = family(name).batch()
    with bind(models[0]):
        ours, stock = (measure(lambda m=m: m(**inputs).loss, exclude=m).bytes for m in models)
    assert ours <= 0.5 * stock


def test_a_training_is_stock_pefts() -> None:
    losses = []
    for bound in (False, True):
        model = bert(use_dora=True)
        randomise_adapters(model)
        keys = set(model.state_dict())
        if bound:
            bind(model)
        losses.append(train(model, adamw(model), batches(6)))
        assert set(model.state_dict()) == keys
        assert any("lora_magnitude_vector" in key for key in keys)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_score_is_that_of_the_output_and_the_base_layers_output(p: float) -> None:
    model, x = one(lora_dropout=p), batch()
    layer = layer_of(model)
    found = AdapterStatistics(blocks=RowBlocks.spread(ROWS, block_rows=8))
    expected = AdapterStatistics(blocks=found.blocks)
    with bind(model):
        layer.__dict__["_safe_state"].observe["default"] = lambda _: found
        out = layer(x)
    base, counts = expected.take(layer.base_layer(x))
    expected.add_features(base, expected.take(out)[0], counts)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=0)
    assert expected.one_minus_cka() > 1e-4


def test_a_schedule_freezes_it_whole() -> None:
    model, optimizer, freezer, _ = run(model=bert(use_dora=True, lora_dropout=0.1))
    assert len(freezer.frozen) > 0
    assert {row.path for row in explain(model)} == {"safe_kernels::dora"}
    frozen = [p for a in freezer.adapters if a.name in freezer.frozen for p in a.parameters()]
    assert any(p.dim() == 1 for p in frozen), "magnitudes are parameters of the adapter"
    model.set_adapter("default")  # PEFT thaws them
    before = [p.detach().clone() for p in frozen]
    train(model, optimizer, batches(2), freezer)
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, frozen, strict=True))


def test_planned_bytes_are_those_of_a_step() -> None:
    model, inputs = bert(use_dora=True, lora_dropout=0.1), next(batches(1))
    with bind(model):
        retained = measure(lambda: model(**inputs).loss, exclude=[model, *inputs.values()]).bytes
    assert plan_memory(model, batch=inputs).ours.retained == retained


def test_compiled_whole() -> None:
    assert_compiled(one(), batch().requires_grad_(), 5)


def test_a_merged_and_a_disabled_adapter_are_pefts(fast_calls: list[Any]) -> None:
    model = one()
    assert_pefts_if_merged_or_disabled(model, layer_of(model).base_layer, batch(), fast_calls)


def test_a_vector_gets_a_dimension_as_in_peft(fast_calls: list[Any]) -> None:
    model = one()
    expected = model(batch()[0, 0])
    bind(model)
    assert torch.equal(model(batch()[0, 0]), expected)
    assert expected.shape == (1, D_OUT)
    assert not fast_calls


def test_an_input_of_another_dtype_is_an_error_as_in_peft(fast_calls: list[Any]) -> None:
    model = one()
    bind(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(batch(torch.float64))
    assert not fast_calls


def test_a_replaced_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(one())
    assert refusal(layer) is None
    monkeypatch.setattr(DoraLinearLayer, "get_weight_norm", lambda *args, **kwargs: torch.ones(D_OUT))
    assert refusal(layer) == "DoraLinearLayer.get_weight_norm is replaced"
