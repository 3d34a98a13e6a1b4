from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny import adamw, batches, bert, causal_batches, gpt2, randomise_adapters, train
from torch import nn
from torch._subclasses import FakeTensorMode

from safe_peft import BindingError, bind
from safe_peft.binding.adapters.lora import SafeLoraLinear
from safe_peft.binding.blocks.norms import Norm
from safe_peft.binding.class_swap import is_bound

Maker = Callable[..., PeftModel]


@pytest.mark.parametrize(("make", "data", "layers"), [(bert, batches, 12), (gpt2, causal_batches, 8)])
def test_training_equals_stock_peft(make: Maker, data: Callable[..., Any], layers: int, fast_calls: list[Any]) -> None:
    stock, bound = make(), make()
    bind(bound)
    expected = train(stock, adamw(stock), data(32))
    got = train(bound, adamw(bound), data(32))
    assert len(fast_calls) == 32 * layers
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_stock_peft(make: Maker, dtype: torch.dtype) -> None:
    """Within twice the error that the working dtype itself brings, measured against float64."""
    batch = next(causal_batches(1) if make is gpt2 else batches(1))
    start = make().to(dtype)
    randomise_adapters(start)

    def gradient(working: torch.dtype, bound: bool = False) -> torch.Tensor:
        model = make().to(working)
        model.load_state_dict(start.state_dict())
        if bound:
            bind(model)
        model(**batch).loss.backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(torch.float64)
    assert (gradient(dtype, bound=True) - exact).norm() <= 2 * (gradient(dtype) - exact).norm()


def test_what_others_see_of_the_model_stays_the_same(tmp_path: Path) -> None:
    model = bert(lora_dropout=0.1)
    before = (repr(model), list(model.state_dict()), [name for name, _ in model.named_modules()])
    model.save_pretrained(tmp_path / "stock")
    with bind(model) as binding:
        assert (repr(model), list(model.state_dict()), [name for name, _ in model.named_modules()]) == before
        assert all(isinstance(layer, PeftLinear) for layer in binding.layers.values())
        model.save_pretrained(tmp_path / "bound")
    stock = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    bound = {path.name: path.read_bytes() for path in (tmp_path / "bound").iterdir()}
    assert stock == bound


def test_an_interrupted_bind_leaves_nothing_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()

    def interrupt(module: nn.Module) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Norm, "recognise", interrupt)
        bind(model)
    assert not any(map(is_bound, model.modules()))
    with bind(model):
        assert any(map(is_bound, model.modules()))
    assert not any(map(is_bound, model.modules()))


def test_bind_does_not_depend_on_a_fake_mode_around_it() -> None:
    model = bert()
    bound = []
    for mode in (torch.enable_grad(), FakeTensorMode()):
        with mode:
            binding = bind(model)
        bound.append([name for name, module in model.named_modules() if is_bound(module)])
        binding.detach()
    assert bound[0] == bound[1]


def test_names_are_paths_in_the_users_own_model() -> None:
    names = list(bind(bert()).layers)
    assert names[0] == "bert.encoder.layer.0.attention.self.query" and len(names) == 12


def test_detach_restores_every_layer() -> None:
    model = bert()
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    before = [set(layer.__dict__) for layer in layers]
    binding = bind(model)
    assert all(isinstance(layer, SafeLoraLinear) for layer in layers)
    binding.detach()
    binding.detach()
    assert all(type(layer) is PeftLinear for layer in layers)
    assert [set(layer.__dict__) for layer in layers] == before


def test_binding_twice_leaves_the_first_binding_in_charge() -> None:
    model = bert()
    first = bind(model)
    second = bind(model)
    assert list(second.layers) == list(first.layers)
    second.detach()
    assert all(isinstance(layer, SafeLoraLinear) for layer in first.layers.values())
    first.detach()
    assert not any(isinstance(module, SafeLoraLinear) for module in model.modules())


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(
        BindingError, match="Sequential has no adapter layer of PEFT, such as those of LoRA; pass the model"
    ):
        bind(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_with_other_adapters_only_is_refused_and_they_are_named() -> None:
    model = get_peft_model(bert().unload(), LoHaConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2))
    with pytest.raises(BindingError, match=r"expected lora\.Linear, found 4 loha\.Linear"):
        bind(model)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
)
def test_a_copy_is_an_ordinary_peft_model(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = bert()
    randomise_adapters(model)
    binding = bind(model)
    twin = copied(model)
    assert sum(type(module) is PeftLinear for module in twin.modules()) == 12
    assert not any(isinstance(module, SafeLoraLinear) for module in twin.modules())
    batch = next(batches(1))
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)
    assert len(bind(twin).layers) == 12
    assert all(isinstance(layer, SafeLoraLinear) for layer in binding.layers.values())


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer
