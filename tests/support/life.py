"""Scripts that use PEFT as its users do, run on a stock model and on a wrapped one, and what is compared of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import batches, gpt2, randomise_adapters
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from safe_peft import AdapterFreezer, SafeConfig

Act = Callable[[Any, Path], Any]


@dataclass(frozen=True)
class Scenario:
    """A script: what it does with a model.

    Args:
        act: the script.
        fails: the name of the exception that it ends with, if it does; None if PEFT's releases differ in it.
        shows_flags: its result shows requires_grad, which freezing changes.
    """

    act: Act
    fails: str | None = ""
    shows_flags: bool = False

    def __str__(self) -> str:
        return self.act.__name__


class Failure(NamedTuple):
    """How a script ended."""

    kind: str
    message: str


SCENARIOS: list[Scenario] = []


def scenario(**options: Any) -> Callable[[Act], Act]:
    """Add a script to the table."""

    def add(act: Act) -> Act:
        SCENARIOS.append(Scenario(act, **options))
        return act

    return add


def start() -> PeftModel:
    """GPT-2 with adapters that do something."""
    model = gpt2()
    randomise_adapters(model)
    return model.eval()


class Gradients(dict[str, Tensor]):
    """By parameter; a frozen one has none."""


def tokens() -> dict[str, Tensor]:
    batch = next(batches(1, rows=3, length=8))
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def logits(one: nn.Module, **options: Any) -> Tensor:
    result: Tensor = one(**tokens(), **options).logits
    return result


def gradients(one: nn.Module) -> Gradients:
    """Gradients of a loss."""
    one.zero_grad()
    one(**tokens()).logits.float().square().mean().backward()
    return Gradients((name, p.grad) for name, p in one.named_parameters() if p.grad is not None)


def outcome(script: Scenario, one: Any, folder: Path) -> Any:
    """What a script returns, or how it fails."""
    folder.mkdir()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return script.act(one, folder)
        except Exception as error:
            return Failure(type(error).__name__, str(error))


def state(one: nn.Module, flags: bool = True) -> dict[str, Any]:
    """What can be seen of a model from outside."""
    layers = {name: module for name, module in one.named_modules() if isinstance(module, BaseTunerLayer)}
    return {
        "printed": repr(one),
        "parameters": {n: (p.dtype, p.device, p.requires_grad and flags) for n, p in one.named_parameters()},
        "state dict": list(one.state_dict()),
        "active": {name: layer.active_adapters for name, layer in layers.items()},
        "merged": {name: layer.merged_adapters for name, layer in layers.items()},
        "disabled": {name: layer.disable_adapters for name, layer in layers.items()},
        "training": {name: module.training for name, module in one.named_modules()},
    }


def assert_same(got: Any, expected: Any, frozen: Collection[str] = ()) -> None:
    """Same values, tensors to the kernels' tolerance; `frozen` parameters may lack their gradients."""
    got_leaves, got_spec = tree_flatten(got)
    leaves, spec = tree_flatten(expected)
    assert got_spec == spec
    for one, other in zip(got_leaves, leaves, strict=True):
        if isinstance(other, Gradients):
            assert set(other) - set(frozen) <= set(one) <= set(other)
            assert_same(dict(one), {name: other[name] for name in one})
        elif isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5 if other.dtype == torch.float32 else 2e-2)
        else:
            assert one == other


def assert_same_files(got: Path, expected: Path) -> None:
    """The same files with the same content; weights to the kernels' tolerance."""
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(got)) for path in got.rglob("*") if path.is_file()) == names
    for name in names:
        if name.endswith(".safetensors"):
            assert_same(load_file(got / name), load_file(expected / name))
        elif name.endswith(".json"):
            assert json.loads((got / name).read_text()) == json.loads((expected / name).read_text())
        else:
            assert (got / name).read_bytes() == (expected / name).read_bytes()


def half_frozen(model: nn.Module) -> tuple[AdapterFreezer, set[str]]:
    """A freezer that has frozen every other adapter, and the names of their parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    freezer = AdapterFreezer(model, optimizer, SafeConfig(score="random"), total_steps=1000)
    for adapter in freezer.adapters[::2]:
        freezer.ledger.record_freezing(0, adapter.name)
        adapter.freeze()
    frozen = {id(p) for adapter in freezer.adapters[::2] for p in adapter.parameters()}
    return freezer, {name for name, p in model.named_parameters() if id(p) in frozen}
