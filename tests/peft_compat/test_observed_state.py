"""A scoring step calls some layers more often than stock PEFT does, and nothing outside of the score shows it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import spectral_norm

from safe_peft import AdapterFreezer, SafeConfig


class Counts(nn.Linear):
    """A base layer whose result depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.shapes = 0, list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        self.shapes.append(x.shape)
        return super().forward(x) * (1 + 0.1 * self.calls + 0.1 * self.seen + 0.1 * len(self.shapes))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,ked->nke", x, self.w).sum(1)


IA3 = IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False)
EXPERTS = LoraConfig(target_parameters=["0.w"], r=2, init_lora_weights=False)
DORA = LoraConfig(target_modules=["0"], r=2, use_dora=True, init_lora_weights=False)
LORA = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)


def compare(base: nn.Module, config: Any, loss: Callable[[nn.Module], Tensor], keys: int = 1) -> None:
    """Compare three training steps, all of them scoring steps, with those of stock PEFT, bit for bit."""
    torch.manual_seed(1)
    stock: Any = get_peft_model(nn.Sequential(base), config)
    if keys > 1:
        stock.add_adapter("second", config)
        stock.base_model.set_adapter(["default", "second"])
    safe = copy.deepcopy(stock)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (stock, safe)]
    freezer = AdapterFreezer(safe, optimizers[1], SafeConfig(score_interval=1), total_steps=100)
    for _ in range(3):
        for model, optimizer in zip((stock, safe), optimizers, strict=True):
            optimizer.zero_grad()
            loss(model).backward()
        for (name, one), other in zip(stock.named_parameters(), safe.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)
        for (name, one), other in zip(stock.named_buffers(), safe.buffers(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)
        for optimizer in optimizers:
            optimizer.step()
        freezer.step()
    assert len(freezer.ledger.scorings) == 3 and not freezer.unscored
    assert all(value > 0 for value in freezer.ledger.importance.values())


def plain(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 48).view(6, 8)).pow(2).mean()


@pytest.mark.parametrize("keys", [1, 2])
@pytest.mark.parametrize("config", [IA3, DORA], ids=["ia3", "dora"])
@pytest.mark.parametrize("make", [Counts, lambda: spectral_norm(nn.Linear(8, 8))], ids=["counts", "spectral_norm"])
def test_the_state_of_a_base_layer_changes_once_per_forward(make: Any, config: Any, keys: int) -> None:
    torch.manual_seed(0)
    compare(make(), config, plain, keys)


@pytest.mark.parametrize("everywhere", [False, True], ids=["own_hooks", "hooks_on_all"])
@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize(
    ("make", "config", "where", "keys"),
    [
        (lambda: nn.Linear(8, 8), IA3, "base_layer", 1),
        (Experts, EXPERTS, "base_layer", 1),
        (lambda: nn.Linear(8, 8), LORA, "lora_B.default", 2),
        (lambda: nn.Linear(8, 8), DORA, "base_layer", 2),
    ],
    ids=["ia3", "experts", "lora", "dora"],
)
def test_a_hook_that_collects_outputs_for_the_loss_gets_those_with_a_graph(
    make: Any, config: Any, where: str, keys: int, place: int, everywhere: bool
) -> None:
    def loss(model: nn.Module) -> Tensor:
        (module,) = (module for name, module in model.named_modules() if name.endswith(f".0.{where}"))
        found: list[Tensor] = []

        def collect(called: nn.Module, args: Any, output: Tensor) -> None:
            if called is module:
                found.append(output)

        with register_module_forward_hook(collect) if everywhere else module.register_forward_hook(collect):
            out = plain(model)
        return out + found[place].pow(2).mean() + 0.1 * len(found)

    torch.manual_seed(0)
    compare(make(), config, loss, keys)
