"""The graph begins at the lowest block in which anything trains, wherever gradient enters the model for nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from blocks import error, freeze, freeze_block, frozen_prefix, loss_and_gradients, retained
from families import family
from oracle import taking_turns
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from safe_peft import AdapterFreezer, SafeConfig, bind, explain

NAMES = ("llama", "bert", "gpt2", "vit", "t5")


@pytest.mark.parametrize("name", NAMES)
def test_the_input_hook_builds_no_graph_below(name: str) -> None:
    model, batch = frozen_prefix(family(name))
    expected = loss_and_gradients(model, batch)
    with bind(model):
        without_hook = retained(model, batch)
    stock = retained(model, batch)
    model.enable_input_require_grads()
    assert retained(model, batch) > stock, "stock PEFT pays for the hook, or the test shows nothing"
    with bind(model):
        assert retained(model, batch) == without_hook
        loss, grads = loss_and_gradients(model, batch)
    assert error(loss, expected[0]) <= 1e-6
    assert grads.keys() == expected[1].keys()
    assert all(error(grad, expected[1][name]) <= 2e-5 for name, grad in grads.items())


@pytest.mark.parametrize(
    ("name", "which", "reentrant", "hook"),
    taking_turns(("llama", "bert", "gpt2"), ("none", "prefix", "alternating"), (False, True), (False, True)),
)
def test_checkpointing_of_both_kinds_gives_the_same_gradients(
    name: str, which: str, reentrant: bool, hook: bool
) -> None:
    one = family(name)
    model, batch = one.model(layers=3), one.batch()
    freeze(model, which)
    expected = loss_and_gradients(model, batch)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if hook:
        model.enable_input_require_grads()
    with bind(model):
        loss, grads = loss_and_gradients(model, batch)
    assert error(loss, expected[0]) <= 1e-6
    assert grads.keys() == expected[1].keys(), "reentrant checkpointing trains nothing over an input without grad"
    assert all(error(grad, expected[1][name]) <= 2e-5 for name, grad in grads.items())


@pytest.mark.parametrize(("name", "checkpoints"), taking_turns(NAMES, (None, False, True)))
def test_where_nothing_trains_a_backward_does_as_little_as_in_stock(name: str, checkpoints: bool | None) -> None:
    model, batch = family(name).model(), family(name).batch()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    if checkpoints is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    stock = model(**batch).loss
    stock.backward()
    before = retained(model, batch)
    with bind(model):
        loss = model(**batch).loss
        loss.backward()
        assert retained(model, batch) <= before
    assert error(loss.detach(), stock.detach()) <= 1e-6


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("place", ["input_layernorm", "mlp.up_proj", "mlp"])
def test_a_vector_that_a_hook_adds_below_the_cut_trains(place: str, reentrant: bool) -> None:
    """No parameter of the block shows it, and no more is kept for it than stock PEFT keeps."""
    model, batch = frozen_prefix(family("llama"))
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    vector = nn.Parameter(torch.full((1,), 0.1))
    block = model.base_model.model.model.layers[1]
    block.get_submodule(place).register_forward_hook(lambda module, args, out: out + vector)

    def measured() -> tuple[int, Tensor, dict[str, Tensor]]:
        bytes_ = retained(model, batch)
        vector.grad = None
        loss, grads = loss_and_gradients(model, batch)
        assert vector.grad is not None
        return bytes_, loss, {**grads, "vector": vector.grad.clone()}

    stock, *expected = measured()
    with bind(model):
        ours, loss, grads = measured()
    assert ours <= stock
    assert grads.keys() == expected[1].keys()
    assert error(loss, expected[0]) <= 1e-6
    assert all(error(grad, expected[1][name]) <= 2e-5 for name, grad in grads.items())


def test_a_trainable_embedding_keeps_the_graph() -> None:
    one = family("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"])
    model, batch = get_peft_model(one.make(2, 0.0), config), one.batch()
    freeze(model, "prefix")
    expected = loss_and_gradients(model, batch)
    assert any("embed_tokens" in name for name in expected[1])
    with bind(model):
        model.enable_input_require_grads()
        grads = loss_and_gradients(model, batch)[1]
    assert grads.keys() == expected[1].keys()
    assert all(error(grad, expected[1][name]) <= 2e-5 for name, grad in grads.items())


def test_an_adapter_on_the_embedding_keeps_the_graph() -> None:
    one = family("llama")
    model = get_peft_model(one.make(2, 0.0), LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"]))
    batch = one.batch()
    expected = loss_and_gradients(model, batch)[1]
    assert any("lora_embedding" in name for name in expected)
    with bind(model):
        assert loss_and_gradients(model, batch)[1].keys() == expected.keys()


def test_inputs_that_the_user_differentiates_keep_the_graph() -> None:
    model, batch = frozen_prefix(family("llama"))
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    with bind(model):
        model.enable_input_require_grads()
        model(inputs_embeds=embeds, labels=batch["labels"]).loss.backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_the_cut_moves_up_with_every_freezing() -> None:
    one = family("llama")
    model, batch = one.model(layers=4), one.batch()
    model.enable_input_require_grads()
    with bind(model) as binding:
        sizes = [retained(model, batch)]
        for name in binding.blocks[:-1]:
            freeze_block(model, name)
            sizes.append(retained(model, batch))
    # The final norm and the loss stay; every block takes the same with it.
    steps = [before - after for before, after in itertools.pairwise(sizes)]
    assert min(steps) > 0
    assert steps[1:] == [steps[1]] * len(steps[1:])


def test_what_the_ledger_froze_and_peft_thawed_is_no_reason_for_a_graph() -> None:
    one = family("llama")
    model, batch = one.model(layers=3), one.batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    freezer = AdapterFreezer(model, optimizer, SafeConfig(total_steps=100))
    for adapter in freezer.adapters:
        if ".layers.0." in f".{adapter.name}":
            adapter.freeze()
    expected = retained(model, batch)
    for adapter in freezer.adapters:
        for parameter in adapter.parameters():
            parameter.requires_grad_(True)
    assert retained(model, batch) == expected


def test_explain_says_where_the_graph_begins() -> None:
    one = family("llama")
    model = one.model(layers=3)
    with bind(model) as binding:
        freeze_block(model, binding.blocks[0])
        freeze_block(model, binding.blocks[2])
        binding.recompute.add(binding.blocks[2])
        states = dict(explain(model).blocks)
        assert "recomputed in backward" in str(explain(model))
    assert states == {
        "model.layers.0": "no graph: nothing in it or below it trains",
        "model.layers.1": "trains",
        "model.layers.2": "frozen, recomputed in backward",
    }


def test_a_caller_without_grad_is_left_alone() -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    with bind(model), torch.no_grad():
        assert not model(**batch).logits.requires_grad
    with bind(model), torch.inference_mode():
        assert model.eval()(**batch).logits.is_inference()
