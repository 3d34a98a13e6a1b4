"""Bound blocks compute what stock PEFT computes, in every family, whatever is frozen."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from blocks import error, freeze, loss_and_gradients, together
from families import FAMILIES, Family, family
from peft import PeftModel
from tiny import adamw

from safe_peft import bind

FROZEN = ("none", "prefix", "suffix", "alternating", "random", "all")


@pytest.mark.parametrize("which", FROZEN)
@pytest.mark.parametrize("one", FAMILIES, ids=str)
def test_loss_and_gradients_are_stock_pefts(one: Family, which: str) -> None:
    model, batch = one.model(), one.batch()
    freeze(model, which)
    loss, grads = loss_and_gradients(model, batch)
    with bind(model):
        own_loss, own_grads = loss_and_gradients(model, batch)
    assert error(own_loss, loss) <= 1e-6
    assert own_grads.keys() == grads.keys()
    assert bool(grads) == (which != "all")
    for name, grad in grads.items():
        assert error(own_grads[name], grad) <= 2e-5, name


@pytest.mark.parametrize("which", ["none", "alternating"])
@pytest.mark.parametrize("one", [family(name) for name in ("llama", "gemma", "bert", "gpt2", "t5-gated")], ids=str)
def test_bf16_is_as_near_the_truth_as_stock_peft(one: Family, which: str) -> None:
    exact = one.model(dtype=torch.float64)
    stock = one.model(dtype=torch.bfloat16)
    exact.load_state_dict(stock.state_dict())
    batch = one.batch()
    wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in batch.items()}
    for model in (exact, stock):
        freeze(model, which)
    (truth, true_grads), (loss, grads) = loss_and_gradients(exact, wide), loss_and_gradients(stock, narrow)
    with bind(stock):
        own_loss, own_grads = loss_and_gradients(stock, narrow)
    rounding = torch.finfo(torch.bfloat16).eps
    assert error(own_loss, truth) <= 2 * error(loss, truth) + rounding
    # All gradients as one vector: of a single small one either side may be right by luck.
    exact_grad, stock_grad, own_grad = (together(found) for found in (true_grads, grads, own_grads))
    assert error(own_grad, exact_grad) <= 2 * error(stock_grad, exact_grad)


def frozen_steps() -> Iterator[tuple[int, str]]:
    yield from ((8, "prefix"), (16, "alternating"))


@pytest.mark.parametrize("one", [family(name) for name in ("llama", "bert", "gpt2")], ids=str)
def test_thirty_two_steps_with_freezing_in_the_middle_converge_alike(one: Family) -> None:
    def train(model: PeftModel) -> list[float]:
        optimizer, batch, losses, events = adamw(model, lr=1e-2), one.batch(), [], dict(frozen_steps())
        for step in range(32):
            if step in events:
                freeze(model, events[step])
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    stock = one.model()
    bound = copy.deepcopy(stock)
    expected = train(stock)
    with bind(bound):
        losses = train(bound)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < 0.95 * losses[0], "it must learn, or equality says little"


@pytest.mark.parametrize("one", [family("bert"), family("phi3"), family("t5")], ids=str)
def test_dropout_follows_the_seed_and_is_off_in_evaluation(one: Family) -> None:
    model, batch = one.model(p=0.5, lora_dropout=0.5), one.batch()
    plain = copy.deepcopy(model).eval()(**batch).loss
    with bind(model):
        losses = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            losses.append(model(**batch).loss.item())
        assert losses[0] == losses[1] != losses[2]
        assert error(model.eval()(**batch).loss, plain) <= 1e-6
