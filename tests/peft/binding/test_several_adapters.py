"""Layers with several active adapters, and adapters with a bias (`lora_bias`): stock PEFT is the oracle."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import randomise_adapters
from torch import Tensor, nn

from safe_kernels.retention import measure
from safe_peft import AdapterFreezer, SafeConfig, bind, explain

BIAS, TWO = {"lora_bias": True}, ("default", "second")


def stack(keys: tuple[str, ...], base_bias: bool = True, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24, bias=base_bias), nn.Linear(24, 8, bias=base_bias)).to(dtype)
    config = {"target_modules": ["0", "1"], "init_lora_weights": False, **lora}
    model = get_peft_model(base, LoraConfig(r=4, **config), autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for r, key in enumerate(keys[1:], start=2):
        model.add_adapter(key, LoraConfig(r=r, **config))
    model.to(dtype).base_model.set_adapter(list(keys))
    randomise_adapters(model)
    return model.train()


def choose(model: nn.Module, trains: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and any(f".{key}." in name for key in trains))


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> tuple[int, list[Tensor]]:
    """Return the retained bytes; and the output, the gradient of x, and those of the parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        retained = measure(lambda: model(x), exclude=model)
    retained.output.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return retained.bytes, [retained.output.detach(), x.grad, *gradients]  # type: ignore[list-item]


CASES = [
    (keys, trains, lora, base_bias)
    for keys, lora, base_bias in product((("default",), TWO, (*TWO, "third")), ({}, BIAS), (True, False))
    for trains in sorted({keys, keys[:1], keys[-1:]})
]


@pytest.mark.parametrize(("keys", "trains", "lora", "base_bias"), CASES)
def test_gradients_are_pefts_and_bytes_are_fewer(
    keys: tuple[str, ...], trains: tuple[str, ...], lora: dict[str, Any], base_bias: bool
) -> None:
    stock, bound = (stack(keys, base_bias, torch.float64, **lora) for _ in range(2))
    bind(bound)
    for model in (stock, bound):
        choose(model, trains)
    x = torch.randn(5, 16, dtype=torch.float64)
    (bytes_stock, expected), (bytes_bound, found) = step(stock, x), step(bound, x)
    assert all(line.path == "safe_kernels::lora_linear" for line in explain(bound).layers)
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert bytes_bound <= bytes_stock


def test_x_is_retained_once_and_only_for_what_trains() -> None:
    model = stack((*TWO, "third"), lora_dropout=0.1, **BIAS)
    bind(model)
    x, rows = torch.randn(5, 16), 5 * (16 + 24) * 4
    choose(model, ("default", "second", "third"))
    assert step(model, x)[0] == rows + 6 * 16  # both layers' inputs, and a random state per adapter
    choose(model, ("third",))
    assert step(model, x)[0] == rows + 6 * 16, "the gradient passes through the frozen ones: their masks are made again"
    choose(model, ())
    assert step(model.eval(), x)[0] == 0


@pytest.mark.parametrize("lora", [{}, BIAS], ids=["no bias", "bias"])
def test_autocast(lora: dict[str, Any]) -> None:
    stock, bound = (stack(TWO, **lora) for _ in range(2))
    bind(bound)
    x = torch.randn(5, 16)
    for one, other in zip(step(bound, x, autocast=True)[1], step(stock, x, autocast=True)[1], strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


def test_compiles_without_a_break() -> None:
    stock, bound = (stack(TWO, **BIAS) for _ in range(2))
    bind(bound)
    compiled, x = torch.compile(bound, backend="aot_eager", fullgraph=True), torch.randn(5, 16)
    for one, other in zip(step(compiled, x)[1], step(stock, x)[1], strict=True):
        torch.testing.assert_close(one, other)


def test_each_adapter_is_compared_with_the_base_layers_output() -> None:
    model = stack(TWO, **BIAS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = SafeConfig(
        threshold=0.0, warmup=8, max_warmup=8, freeze_end=9, score_interval=1, score_blocks=1, block_rows=64
    )
    freezer = AdapterFreezer(model, optimizer, config, total_steps=10)
    alone = {}
    for keys in (TWO, *((key,) for key in TWO)):
        model.base_model.set_adapter(list(keys))
        torch.manual_seed(3)
        model.base_model.model[0](torch.randn(64, 16)).sum().backward()
        freezer.step()
        for adapter in freezer.adapters:
            if adapter.name.startswith("0") and adapter.key in keys:
                alone.setdefault(adapter.name, []).append(freezer.ledger.importance[adapter.name])
    assert len(alone) == 2
    for together, by_itself in alone.values():
        assert together == pytest.approx(by_itself, rel=1e-4) and together > 0


def test_a_scoring_step_does_not_change_what_explain_says() -> None:
    model, x = stack(TWO), torch.randn(64, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    freezer = AdapterFreezer(
        model, optimizer, SafeConfig(threshold=0.0, warmup=8, max_warmup=9, score_interval=1), total_steps=20
    )
    model.eval()(x)
    model.train()(x).sum().backward()
    freezer.step()
    assert len(freezer.ledger.scorings) == 1
    assert all(line.path == "safe_kernels::lora_linear" for line in explain(model).layers)


def test_a_bias_over_an_input_of_fewer_bits_is_left_to_peft() -> None:
    stock, bound = (stack(("default",), **BIAS) for _ in range(2))
    for model in (stock, bound):
        model.base_model.model[0].base_layer.bfloat16()
    bind(bound)
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    assert torch.equal(bound.base_model.model[0](x), stock.base_model.model[0](x))
    assert bound.base_model.model[0]._refusal(bound.base_model.model[0], (x,)) is not None
