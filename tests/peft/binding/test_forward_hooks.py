"""Scores and batches are seen as with the PEFT model itself, whatever holds it and whichever module is called."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import BERT_TARGETS, EARLY, adamw, batches, bert
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.binding.forward_hooks import watched

BYTES = {**EARLY, "target": "bytes", "target_fraction": 0.5}


class Holder(nn.Module):
    """As a LightningModule does, it calls what it holds from a method that is not `forward`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss


class Direct(Holder):
    """Calls `forward`, which runs no hook of the outermost model."""

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.net.forward(**batch).loss
        return loss


class Features(nn.Module):
    """As sentence-transformers' modules do, it takes one dict and calls the model in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.auto_model = net

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> Any:
        return self.auto_model(**features, **kwargs)


class Sequence(nn.Sequential):
    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self(batch).loss
        return loss


def positional(net: nn.Module) -> nn.Module:
    class Positional(Holder):
        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            loss: Tensor = self.net(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
            return loss

    return Positional(net)


def inner(net: Any) -> nn.Module:
    """The model without PEFT's, into which the adapters were put."""
    return net.get_base_model()  # type: ignore[no-any-return]


HOLDERS: dict[str, Callable[[nn.Module], Any]] = {
    "module": Holder,
    "forward": Direct,
    "positional": positional,
    "inner model": lambda net: Holder(inner(net)),
    "inner model's forward": lambda net: Direct(inner(net)),
    "features": lambda net: Sequence(Features(net)),
    "features, inner model": lambda net: Sequence(Features(inner(net))),
    "deep": lambda net: nest(net),
}


def nest(net: nn.Module) -> nn.Module:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"net": Holder(net)})

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            return self.parts["net"].training_step(batch)  # type: ignore[operator, no-any-return]

    return Deep()


def short(name: str) -> str:
    return name[name.index("bert.encoder") :]


def seen(model: nn.Module, step: Callable[[dict[str, Tensor]], Tensor], **options: Any) -> tuple[Any, Any]:
    optimizer = adamw(model, lr=0.0)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**{**BYTES, **options}))
    for batch in batches(16):
        step(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    importance = {short(name): value for name, value in freezer.ledger.scorings[0].importance.items()}
    freezer.detach()
    return importance, [short(name) for name in freezer.frozen]


@pytest.fixture(scope="module")
def expected() -> tuple[Any, Any]:
    model = bert()
    found = seen(model, lambda batch: model(**batch).loss)
    assert found[1]
    return found


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_the_model_changes_neither_scores_nor_bytes(name: str, expected: tuple[Any, Any]) -> None:
    holder = HOLDERS[name](bert())
    importance, frozen = seen(holder, holder.training_step)
    assert importance == pytest.approx(expected[0], rel=1e-6)
    assert frozen == expected[1]


def test_two_towers_have_masks_and_bytes_of_their_own(expected: tuple[Any, Any]) -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = bert(), bert()

        def training_step(self, batch: dict[str, Tensor]) -> Tensor:
            other = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
            loss: Tensor = self.left(**batch).loss + self.right(**other).loss
            return loss

    model = Towers()
    optimizer = adamw(model, lr=0.0)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**{**BYTES, "target_fraction": 0.9}))
    for batch in batches(16):
        model.training_step(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    first = freezer.ledger.scorings[0].importance
    left = {short(name): value for name, value in first.items() if name.startswith("left")}
    assert left == pytest.approx(expected[0], rel=1e-6)
    assert {name.partition(".")[0] for name in freezer.frozen} == {"left", "right"}


def test_a_model_without_peft_or_transformers_is_watched_down_to_where_its_adapters_part() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    holder = Holder(inject_adapter_in_model(LoraConfig(target_modules=["0", "1"]), Net()))
    assert watched(holder) == [holder, holder.net, holder.net.body]


def test_adapters_that_were_injected_into_a_model_of_transformers_are_found() -> None:
    model = BertForSequenceClassification(bert().get_base_model().config)
    holder = Holder(inject_adapter_in_model(LoraConfig(target_modules=BERT_TARGETS), model))
    assert set(watched(holder)) == {holder, model, model.bert}


def test_copies_and_pickles_are_not_watched() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(**next(batches(1)))
    assert freezer.state_dict()["evidence"]["sums"] == []
    freezer.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
