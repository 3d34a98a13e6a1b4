"""Binding, freezers, plans and `explain` leave a model as it was, whatever its Python does while it is listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import EARLY, adamw, randomise_adapters
from torch import Tensor, nn

import safe_peft
from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.planning.fake_model import FakeModel


class Net(nn.Module):
    """PEFT's layer for `nn.MultiheadAttention` makes new parameters whenever its modules are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin(self.mha(x, x, x)[0])
        return found


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def attention() -> Any:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(target_modules=["mha", "lin"], r=2)).train()
    randomise_adapters(model)
    return model


def make_freezer(model: Any) -> None:
    AdapterFreezer(model, adamw(model), SafeConfig(**EARLY)).detach()


def train_by_bytes(model: Any) -> None:
    optimizer = adamw(model, lr=0.0)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, target="bytes", target_fraction=0.5))
    for _ in range(6):
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
    freezer.detach()


def plan(model: Any) -> None:
    safe_peft.plan_memory(model, batch={"x": X})


def plan_that_fails(model: Any) -> None:
    with pytest.raises(safe_peft.PlanError):
        safe_peft.plan_memory(model, batch={"x": X[..., :5]})


def copy_that_fails(model: Any) -> None:
    model.generator = (one for one in ())
    with pytest.raises(safe_peft.PlanError):
        FakeModel(model)
    del model.generator


def bind_and_detach(model: Any) -> None:
    with safe_peft.bind(model):
        model(X)
    str(safe_peft.explain(model))


@pytest.mark.parametrize("act", [bind_and_detach, make_freezer, train_by_bytes, plan, plan_that_fails, copy_that_fails])
def test_the_model_is_as_before(act: Callable[[Any], None]) -> None:
    model, fresh = attention(), attention()
    act(model)
    assert list(model.state_dict()) == list(fresh.state_dict())
    torch.testing.assert_close(model.state_dict(), fresh.state_dict(), rtol=1e-5, atol=1e-6)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in fresh.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    assert flags == [p.requires_grad for p in fresh.parameters()]
    torch.testing.assert_close(model(X), fresh(X), rtol=1e-5, atol=1e-6)
    model(X).sum().backward()
