"""Attention that rotates queries and keys: what is recognised, and every change of the code that computes it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from blocks import error, loss_and_gradients, retained, together
from families import family
from torch import Tensor, nn

import safe_kernels
from safe_peft import bind, explain
from safe_peft.binding.blocks.rotary import Rotary
from safe_peft.binding.class_swap import original_type

NAMES = ("llama", "qwen3", "gemma", "phi3")


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the op was called with."""
    calls: list[Tensor] = []
    op = safe_kernels.rotary

    def rotary(x: Tensor, *others: Tensor) -> Tensor:
        calls.append(x)
        return op(x, *others)

    monkeypatch.setattr(safe_kernels, "rotary", rotary)
    return calls


def attention(model: nn.Module) -> nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("self_attn"))


def file_of(model: nn.Module) -> ModuleType:
    return sys.modules[original_type(attention(model)).__module__]


def assert_as_stock(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with bind(model):
        loss, grads = loss_and_gradients(model, batch)
    assert_equal((loss, grads), loss_and_gradients(model, batch))


def assert_equal(ours: tuple[Tensor, dict[str, Tensor]], stock: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert error(ours[0], stock[0]) <= 1e-6
    assert ours[1].keys() == stock[1].keys()
    for path, grad in stock[1].items():
        assert error(ours[1][path], grad) <= 2e-5, path


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_of_every_layer(name: str, rotations: list[Tensor]) -> None:
    one = family(name)
    model, batch = one.model(), one.batch()
    assert_as_stock(model, batch)
    layers = model.config.num_hidden_layers
    assert len(rotations) == 2 * layers
    with bind(model):
        assert f"{layers} by safe_kernels::rotary" in str(explain(model))
        whole = retained(model, batch)
    with bind(model, parts=("norms", "mlps", "dropouts")):
        less = retained(model, batch) - whole
    # Phi-3's function makes heads before tokens, so there the output of SDPA is copied for the next layer.
    hidden = batch["input_ids"].numel() * model.config.hidden_size * 4
    assert less == (layers * hidden if name == "phi3" else 0)


def test_a_part_of_the_features(rotations: list[Tensor]) -> None:
    one = family("phi3")
    model, batch = one.model(), one.batch()
    rotary = next(module for module in model.modules() if "RotaryEmbedding" in type(module).__name__)
    rotary.inv_freq = rotary.inv_freq[:-1]
    assert_as_stock(model, batch)
    assert len(rotations) == 2 * model.config.num_hidden_layers


def halved(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return found * 0.5 if isinstance(found, Tensor) else tuple(tensor * 0.5 for tensor in found)

    return changed


@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "rotate_half", "eager_attention_forward"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_replaced_function_runs(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    model.config._attn_implementation = "eager"
    before = loss_and_gradients(model, batch)
    file = file_of(model)
    if when == "before":
        monkeypatch.setattr(file, name, halved(getattr(file, name)))
    with bind(model):
        monkeypatch.setattr(file, name, halved(getattr(file, name)))
        ours = loss_and_gradients(model, batch)
    stock = loss_and_gradients(model, batch)
    assert max(error(grad, before[1][path]) for path, grad in stock[1].items()) > 1e-2, "a change that matters"
    assert_equal(ours, stock)


def test_a_replaced_forward_runs(rotations: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    kind = type(attention(model))
    own = kind.forward
    with bind(model):
        monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: (own(*args, **kwargs)[0] * 0.5, None))
        ours = loss_and_gradients(model, batch)
    assert rotations == []
    assert_equal(ours, loss_and_gradients(model, batch))


def test_decorators_of_the_forward_stay(rotations: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    kind = type(attention(model))
    own = kind.forward

    def decorator(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
        @functools.wraps(function)
        def decorated(*args: Any, **kwargs: Any) -> Any:
            out, weights = function(*args, **kwargs)
            return out * factor, weights

        return decorated

    monkeypatch.setattr(kind, "forward", decorator(decorator(own, 0.5), 3.0))
    monkeypatch.setattr("safe_peft.binding.blocks.rotary.own_method", lambda kind, name: getattr(kind, name))
    assert_as_stock(model, batch)
    assert len(rotations) == 2 * model.config.num_hidden_layers


def test_a_function_that_computes_otherwise_is_not_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").model()
    assert Rotary.recognise(attention(model)) is not None
    file = file_of(model)

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + file.rotate_half(q) * sin, k * cos - file.rotate_half(k) * sin

    monkeypatch.setattr(file, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    assert Rotary.recognise(attention(model)) is None


def test_autocast_as_near_the_truth_and_no_more_bytes(rotations: list[Tensor]) -> None:
    """Queries are bfloat16, and cos is float32: the result is float32."""
    one = family("llama")
    model, batch = one.model(), one.batch()
    truth, true_grads = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        stock, stock_grads = loss_and_gradients(model, batch)
        with bind(model, parts=("norms", "mlps", "dropouts")):
            without = retained(model, batch)
        with bind(model):
            ours, grads = loss_and_gradients(model, batch)
            assert retained(model, batch) == without
    assert len(rotations) == 4 * model.config.num_hidden_layers
    assert {tensor.dtype for tensor in rotations} == {torch.float32}
    assert error(ours, truth) <= 2 * error(stock, truth) + torch.finfo(torch.bfloat16).eps
    assert error(together(grads), together(true_grads)) <= 2 * error(together(stock_grads), together(true_grads))


def test_angles_that_require_grad(rotations: list[Tensor]) -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    rotary = next(module for module in model.modules() if "RotaryEmbedding" in type(module).__name__)
    angles: list[Tensor] = []

    def learned(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        angles[:] = [tensor.detach().requires_grad_() for tensor in out]
        return tuple(angles)

    rotary.register_forward_hook(learned)
    found = []
    for bound in (False, True):
        with bind(model) if bound else torch.enable_grad():
            loss_and_gradients(model, batch)
        found.append([tensor.grad for tensor in angles])
    for ours, stock in zip(*found, strict=True):
        assert error(ours, stock) <= 2e-5
    assert rotations == []
