"""What outlives what: methods somebody kept, hooks from before, bindings left early, freezers that are forgotten."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import family
from tiny import EARLY, adamw, batches, bert, run, train
from torch import Tensor, nn

from safe_kernels.retention import measure
from safe_peft import AdapterFreezer, BindingError, ConfigError, SafeConfig, bind, explain
from safe_peft.binding.class_swap import is_bound


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def bound_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_bound(module)]


# ---------------------------------------------------------------- methods that somebody kept


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mpnet"])
def test_forwards_that_were_wrapped_while_bound_work_after_detach(name: str) -> None:
    made, calls = family(name), []
    model, fresh = made.model(p=0.1), made.model(p=0.1)
    binding = bind(model)
    wrapped = bound_modules(model)

    def wrap(module: nn.Module) -> None:
        kept = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return kept(*args, **kwargs)

        module.forward = forward

    for module in wrapped:
        wrap(module)
    binding.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    torch.manual_seed(0)
    loss = model(**made.batch()).loss
    torch.manual_seed(0)
    torch.testing.assert_close(loss, fresh(**made.batch()).loss, rtol=0, atol=0)
    assert len(set(calls)) > len(lora_layers(model))


def test_blocks_that_were_compiled_while_bound_work_after_detach() -> None:
    made = family("llama")
    model, fresh = made.model(), made.model()
    layers = model.get_submodule("base_model.model.model.layers")
    with bind(model):
        for index, block in enumerate(list(layers)):
            layers[index] = torch.compile(block, backend="eager")
        model(**made.batch()).loss.backward()
    model.zero_grad()
    model(**made.batch()).loss.backward()
    fresh(**made.batch()).loss.backward()
    expected = [p.grad for p in fresh.parameters() if p.requires_grad]
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], expected, rtol=0, atol=0)


class Logits(nn.Module):
    """A trace returns tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs).logits


def test_a_trace_of_a_bound_model_is_of_pefts_own_ops() -> None:
    model, batch = bert(layers=1).eval(), next(batches(1))
    with bind(model):
        inputs = (batch["input_ids"], batch["attention_mask"])
        traced = torch.jit.trace(Logits(model), inputs)
        torch.testing.assert_close(traced(*inputs), model(*inputs).logits)
    assert "safe_kernels::" not in str(traced.inlined_graph)


# ---------------------------------------------------------------- hooks from before


def place(layer: nn.Module) -> None:
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


def replace(layer: nn.Module) -> None:
    layer.forward = partial(type(layer).forward, layer)


def disabled_meanwhile(model: Any) -> None:
    with model.disable_adapter():
        pass


def set_again(model: Any) -> None:
    model.set_adapter("default")


@pytest.mark.parametrize("thaw", [disabled_meanwhile, set_again])
@pytest.mark.parametrize("hook", [place, replace])
def test_layers_whose_forward_was_replaced_are_scored_and_stay_frozen(
    hook: Callable[[nn.Module], None], thaw: Callable[[Any], None]
) -> None:
    model = bert()
    for layer in lora_layers(model):
        hook(layer)
    model, optimizer, freezer, losses = run(model=model)
    assert {row.reason for row in explain(model)} == {
        "forward is replaced on the layer itself (device hooks, for instance)"
    }
    assert losses == pytest.approx(run()[3], rel=1e-5) and freezer.unscored == () and len(freezer.frozen) == 9
    assert_still(model, optimizer, freezer, thaw)


def assert_still(model: Any, optimizer: Any, freezer: AdapterFreezer, thaw: Callable[[Any], None]) -> None:
    frozen = [p for adapter in freezer.adapters if adapter.name in freezer.frozen for p in adapter.parameters()]
    before = [p.detach().clone() for p in frozen]
    assert before
    for batch in batches(3, seed=9):
        thaw(model)
        train(model, optimizer, iter([batch]), freezer)
    assert all(torch.equal(p, was) for p, was in zip(frozen, before, strict=True))


def through_the_class(layer: nn.Module) -> None:
    layer.forward = lambda *args: type(layer).forward(layer, *args)


def test_a_replaced_forward_that_calls_its_class_is_scored_once() -> None:
    model = bert()
    for layer in lora_layers(model):
        through_the_class(layer)
    _, _, freezer, _ = run(model=model)
    expected = run()[2].ledger.scorings[0]
    assert freezer.ledger.scorings[0].importance == pytest.approx(expected.importance, rel=1e-3, abs=1e-9)


def test_a_replaced_forward_that_is_taken_away_again_leaves_the_fast_path() -> None:
    model, fresh = bert(), bert()
    for layer in lora_layers(model):
        replace(layer)
    binding = bind(model)
    for layer in lora_layers(model):
        del layer.forward
    batch = next(batches(1))
    torch.testing.assert_close(model(**batch).loss, fresh(**batch).loss)
    assert {row.path for row in explain(model)} == {"safe_kernels::lora_linear"}
    again = bert()
    with bind(again):
        expected = measure(lambda: again(**batch).loss, exclude=again).bytes
    assert measure(lambda: model(**batch).loss, exclude=model).bytes == expected
    assert expected < measure(lambda: fresh(**batch).loss, exclude=fresh).bytes
    binding.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]


# ---------------------------------------------------------------- bindings left early


def test_a_binding_that_ends_before_the_freezer_that_was_made_in_it() -> None:
    model = bert()
    optimizer = adamw(model)
    with bind(model):
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
        train(model, optimizer, batches(8), freezer)
    train(model, optimizer, batches(8, seed=2), freezer)
    assert freezer.unscored == () and len(freezer.frozen) == 9
    assert_still(model, optimizer, freezer, disabled_meanwhile)
    freezer.detach()
    assert not bound_modules(model)


def test_a_binding_that_outlives_the_freezer_that_was_made_in_it() -> None:
    model = bert()
    with bind(model):
        AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).detach()
        assert bound_modules(model)
    assert not bound_modules(model)


# ---------------------------------------------------------------- freezers that are forgotten


def test_a_freezer_that_is_forgotten_lets_another_take_over_and_leaves_nothing() -> None:
    model = bert()
    hooks = len(model._forward_pre_hooks)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="gradient_sensitivity"))
    train(model, optimizer, batches(8), freezer)
    frozen = set(freezer.frozen)
    assert frozen
    del freezer
    gc.collect()
    assert len(model._forward_pre_hooks) == hooks and not optimizer._optimizer_step_pre_hooks
    assert not bound_modules(model)
    second = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    assert frozen < {adapter.name for adapter in second.adapters}


def test_a_freezer_that_is_lost_may_be_released() -> None:
    model = bert()
    lost = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    with pytest.raises(BindingError, match=r"safe_peft\.bind\(model\)\.release\(keep_frozen=False\)"):
        AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    bind(model).release(keep_frozen=False)
    AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).detach()
    assert lost.frozen == ()


@pytest.mark.parametrize("wrong", [{"first_step": "3"}, {"total_steps": 16.5}, {"config": {"score": "none"}}], ids=str)
def test_a_construction_that_fails_leaves_the_model_free(wrong: dict[str, Any]) -> None:
    model = bert()
    options = {"config": SafeConfig(), "total_steps": 16, **wrong}
    with pytest.raises(ConfigError):
        AdapterFreezer(model, adamw(model), **options)
    assert not bound_modules(model)
    AdapterFreezer(model, adamw(model), SafeConfig(), total_steps=16).detach()


def test_a_construction_that_fails_last_leaves_the_model_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(AdapterFreezer, "_arm", lambda self: 1 / 0)
        AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    assert not bound_modules(model)
    AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).detach()


def test_an_optimizer_that_trains_some_adapters_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    some = [p for name, p in model.named_parameters() if "layer.0" in name and p.requires_grad]
    AdapterFreezer(model, torch.optim.AdamW(some), SafeConfig(**EARLY)).detach()
    assert "it does not train 6 of the adapters (bert.encoder.layer.1.attention.self.query, ...)" in caplog.text
