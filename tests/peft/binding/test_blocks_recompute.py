"""A frozen block that runs again in backward: exact, dropout and random state included; its input is all it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks import freeze, freeze_block, loss_and_gradients
from families import LENGTH, ROWS, D, Family, family
from torch import Tensor

from safe_kernels.retention import measure
from safe_peft import BindingError, bind
from safe_peft.binding.blocks.recompute import Run

RNG_STATE = torch.get_rng_state().nbytes


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("one", [family(name) for name in ("llama", "bert", "gpt2", "mpnet", "vit")], ids=str)
def test_gradients_are_the_same_to_the_last_bit(one: Family, p: float) -> None:
    model, batch = one.model(layers=3, p=p, lora_dropout=p), one.batch()
    with bind(model) as binding:
        freeze_block(model, binding.blocks[1])
        freeze_block(model, binding.blocks[2])
        results = []
        for names in ((), binding.blocks[1:]):
            binding.recompute = names
            torch.manual_seed(7)
            results.append((*loss_and_gradients(model, batch), torch.get_rng_state()))
    (loss, grads, state), (again, again_grads, again_state) = results
    assert torch.equal(loss, again)
    assert torch.equal(state, again_state), "what comes after draws the same numbers"
    assert grads.keys() == again_grads.keys()
    assert all(torch.equal(grads[name], again_grads[name]) for name in grads)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("one", [family("llama"), family("bert")], ids=str)
def test_it_retains_its_input_alone(one: Family, p: float) -> None:
    def retained(layers: int) -> int:
        model, batch = one.model(layers=layers, p=p, lora_dropout=p), one.batch()
        binding = bind(model)
        for path in binding.blocks[1:]:
            freeze_block(model, path)
        binding.recompute.update(binding.blocks)
        return measure(lambda: model(**batch).loss, exclude=[model, *batch.values()]).bytes

    block_input = 4 * ROWS * LENGTH * D
    draws = (
        p > 0 and one.name != "llama"
    )  # a frozen adapter's dropout is on here, as nobody but a freezer switches it off
    expected = block_input + (RNG_STATE if draws or p > 0 else 0)
    assert retained(4) - retained(3) == expected


@pytest.mark.parametrize("names", ["model.layers.7", ["layers.0"], {"model.layers.0", "norm"}])
def test_a_name_of_no_block_is_refused(names: Any) -> None:
    with bind(family("llama").model(layers=2)) as binding:
        binding.recompute = binding.blocks[:1]
        with pytest.raises(BindingError, match=r"recompute: .* are no blocks of this model"):
            binding.recompute = names
        assert binding.recompute == set(binding.blocks[:1])


def test_a_block_that_trains_is_not_run_again() -> None:
    one = family("llama")
    model, batch = one.model(layers=3), one.batch()
    calls: list[str] = []
    with bind(model) as binding:
        binding.recompute.update(binding.blocks)
        layers = model.base_model.model.model.layers
        for index, layer in enumerate(layers):
            layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(str(index)))
        freeze_block(model, binding.blocks[1])
        model(**batch).loss.backward()
    assert calls == ["0", "1", "2", "1"]


def test_a_frozen_prefix_is_not_run_again_since_no_gradient_passes() -> None:
    one = family("llama")
    model, batch = one.model(layers=3), one.batch()
    calls: list[int] = []
    with bind(model) as binding:
        binding.recompute.update(binding.blocks)
        freeze_block(model, binding.blocks[0])
        model.base_model.model.model.layers[0].register_forward_hook(lambda *_: calls.append(0))
        model(**batch).loss.backward()
    assert calls == [0]


def test_autocast_is_as_it_was() -> None:
    one = family("llama")
    model, batch = one.model(layers=3), one.batch()
    with bind(model) as binding, torch.autocast("cpu", dtype=torch.bfloat16):
        freeze_block(model, binding.blocks[1])
        loss = model(**batch).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with bind(model) as binding:
        binding.recompute.update(binding.blocks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = model(**batch).loss
        again.backward()
    assert torch.equal(loss, again)
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_results_of_any_kind_come_back_as_they_were() -> None:
    x = torch.randn(3, requires_grad=True)

    def block(hidden: Tensor, *, scale: float, cache: None) -> tuple[Tensor, None, dict[str, Tensor]]:
        return hidden * scale, None, {"norm": hidden.norm()}

    out, nothing, named = Run(block).first((x,), {"scale": 2.0, "cache": None})
    assert nothing is None
    (out.sum() + named["norm"]).backward()
    torch.testing.assert_close(x.grad, 2.0 + (x / x.norm()).detach())


def test_a_result_that_nobody_differentiates_costs_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    out, _ = Run(lambda hidden: (hidden * 2, hidden * 3)).first((x,), {})
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_the_second_derivative_is_the_one_without_it() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(Run(torch.sin).first((x,), {}).sum(), x, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(x.grad, -torch.sin(x.detach()))


@pytest.mark.parametrize("one", [family("bert"), family("t5")], ids=str)
def test_blocks_here_and_there(one: Family) -> None:
    """A decoder's blocks all read the encoder's output, so that sums are made in another order."""
    model, batch = one.model(layers=4), one.batch()
    freeze(model, "random")
    expected = loss_and_gradients(model, batch)
    with bind(model) as binding:
        binding.recompute.update(binding.blocks)
        loss, grads = loss_and_gradients(model, batch)
    torch.testing.assert_close(loss, expected[0])
    for name, grad in expected[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)
