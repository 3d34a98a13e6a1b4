"""Runs a recipe of docs/recipes.md as it is printed, with stock PEFT and with ours, and compares what comes out.

The recipe's text is the same every time. What changes is `AdapterFreezer`: it does nothing (stock PEFT), it binds and
never freezes, it is ours, or it freezes by hand, in stock PEFT, what ours has frozen at the same steps.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, set_seed

import safe_peft
import safe_peft.callback
import safe_peft.lightning
from safe_kernels import retention
from safe_peft.binding.bind import bind
from safe_peft.freezing.freezer import AdapterFreezer

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
MAKERS = (safe_peft, safe_peft.callback, safe_peft.lightning)
"""Modules whose name `AdapterFreezer` the recipes reach."""


def recipe(name: str) -> str:
    """The block of docs/recipes.md that opens with this name."""
    found = re.findall(rf"```python {name}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(found) == 1, f"docs/recipes.md has {len(found)} blocks named {name}"
    return found[0]


@dataclass
class Outcome:
    """What a training gave: by step, by parameter, by file."""

    folder: Path
    model: nn.Module | None = None
    losses: list[float] = field(default_factory=list)
    retained: list[int] = field(default_factory=list)
    first: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    freezer: AdapterFreezer | None = None

    def gradients(self) -> dict[str, Tensor]:
        """Those of the first backward."""
        known = {id(parameter): gradient for parameter, gradient in self.first}
        assert self.model is not None
        return {n: known[id(p)] for n, p in self.model.named_parameters() if id(p) in known}

    def frozen(self) -> dict[int, list[str]]:
        """Parameters that froze, by the step after which they did."""
        assert self.freezer is not None and self.model is not None
        paths = {id(parameter): path for path, parameter in self.model.named_parameters()}
        of = {adapter.name: [paths[id(p)] for p in adapter.parameters()] for adapter in self.freezer.adapters}
        found: dict[int, list[str]] = {}
        for freezing in self.freezer.ledger.freezings:
            found.setdefault(freezing.step, []).extend(of[freezing.name])
        return found

    def weights(self) -> dict[str, Tensor]:
        assert self.model is not None
        return {
            name: parameter.detach() for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    def files(self) -> dict[str, Tensor]:
        """Every tensor of every checkpoint and result on the disk."""
        return {
            f"{path.relative_to(self.folder)}: {key}": value
            for path in sorted(self.folder.rglob("*.safetensors"))
            for key, value in load_file(path).items()
        }

    def configs(self) -> dict[str, Any]:
        paths = sorted(self.folder.rglob("adapter_config.json"))
        return {str(path.relative_to(self.folder)): json.loads(path.read_text()) for path in paths}


class Saved:
    """What autograd holds in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), tensor._version

    def back(self) -> Tensor:
        assert self.tensor._version == self.version, "written to in place after it was saved"
        return self.tensor


@contextmanager
def watched(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Notes each loss whose `backward` is called, and what its graph retains, counted as `retention.measure` does."""
    refs: list[weakref.ref[Saved]] = []
    backward = torch.Tensor.backward

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        refs.append(weakref.ref(saved))
        return saved

    def noted(loss: Tensor, *args: Any, **options: Any) -> None:
        assert outcome.model is not None, "the recipe has made no freezer"
        parameters = list(outcome.model.parameters())
        own = {key for parameter in parameters for key, _ in retention.storages(parameter)}
        held = dict(item for ref in refs if (saved := ref()) for item in retention.storages(saved.tensor))
        outcome.losses.append(loss.item())
        outcome.retained.append(sum(size for key, size in held.items() if key not in own))
        del held
        refs.clear()
        backward(loss, *args, **options)
        if not outcome.first:
            outcome.first = [(p, p.grad.clone()) for p in parameters if p.grad is not None]

    with monkeypatch.context() as patch, saved_tensors_hooks(pack, Saved.back):
        patch.setattr(torch.Tensor, "backward", noted)
        yield


class Idle:
    """In an AdapterFreezer's place: stock PEFT, bound or not, with the adapters frozen that `by_step` names."""

    def __init__(self, outcome: Outcome, binds: bool = False, by_step: Mapping[int, list[str]] | None = None) -> None:
        self.outcome, self.binds, self.by_step = outcome, binds, by_step or {}
        self.done, self.bound = 0, None

    def __call__(self, model: nn.Module, optimizer: Any, *args: Any, **options: Any) -> Idle:
        self.model = self.outcome.model = model
        (optimizer,) = optimizer if isinstance(optimizer, list) else [optimizer]
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate puts another around it
        self.optimizer.register_step_pre_hook(self.hold)
        if self.binds:
            self.bound = bind(model)
        return self

    def hold(self, *_: Any) -> None:
        """Stock PEFT makes every adapter trainable on leaving `disable_adapter()`; the optimizer must not move it."""
        parameters = dict(self.model.named_parameters())
        for name in (name for step, names in self.by_step.items() if step <= self.done for name in names):
            parameters[name].grad = None

    def step(self) -> tuple[str, ...]:
        self.done += 1
        parameters = dict(self.model.named_parameters())
        for name in self.by_step.get(self.done, ()):
            parameters[name].requires_grad_(False).grad = None
            self.optimizer.state.pop(parameters[name], None)
        return ()

    def detach(self) -> None:
        parameters = dict(self.model.named_parameters())
        for names in self.by_step.values():
            for name in names:
                parameters[name].requires_grad_(True)
        if self.bound is not None:
            self.bound.detach()

    def state_dict(self) -> dict[str, Any]:
        return {}

    metrics = state_dict

    def __getattr__(self, name: str) -> Any:
        """Whatever else the callbacks ask of a freezer."""
        return MagicMock()

    def load_state_dict(self, state: Any) -> None:
        pass

    def save(self, path: Path, files: Any = ()) -> None:
        pass


class Compared(NamedTuple):
    """A line of the table."""

    client: str
    loss: float
    gradient: float
    weight: float
    files: int
    stock: int
    bound: int
    stock_frozen: int
    frozen: int


@contextmanager
def bound_before_training(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Trainer's callback binds when training begins; the page's one line for the fast path alone does so before."""
    train = Trainer.train

    def bind_and_train(trainer: Trainer, *args: Any, **options: Any) -> Any:
        bind(trainer.model)
        return train(trainer, *args, **options)

    with patch.context() as patched:
        patched.setattr(Trainer, "train", bind_and_train)
        yield


def trained(
    name: str, names: Callable[[Path], dict[str, Any]], folder: Path, patch: pytest.MonkeyPatch
) -> dict[str, Outcome]:
    """The four trainings by their name."""
    outcomes: dict[str, Outcome] = {}

    def run(mode: str, make: Callable[..., Any]) -> None:
        outcome = outcomes[mode] = Outcome(folder=folder / mode.replace(" ", "_"))
        outcome.folder.mkdir()
        set_seed(0)
        config = safe_peft.SafeConfig(target_fraction=0.75)
        given = {"safe_peft": safe_peft, "torch": torch, "config": config, "folder": str(outcome.folder)}
        outcome.names = {**given, **names(outcome.folder)}
        set_seed(1)
        with patch.context() as patched, watched(outcome, patch):
            for module in MAKERS:
                patched.setattr(module, "AdapterFreezer", make(outcome))
            exec(compile(recipe(name), name, "exec"), outcome.names)

    run("stock", Idle)
    with bound_before_training(patch):
        run("bound", partial(Idle, binds=True))
    run("ours", partial(partial, kept))
    run("stock frozen", partial(Idle, by_step=outcomes["ours"].frozen()))
    return outcomes


def kept(outcome: Outcome, *args: Any, **options: Any) -> AdapterFreezer:
    """A freezer that is looked at afterwards."""
    outcome.freezer = AdapterFreezer(*args, **options)
    outcome.model = outcome.freezer.model
    return outcome.freezer


def farthest(stock: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """The largest difference over the largest element, over all tensors."""
    assert stock.keys() == ours.keys()
    assert stock, "nothing to compare"
    scale = max(float(value.abs().max()) for value in stock.values())
    return max(float((stock[key].float() - ours[key].float()).abs().max()) for key in stock) / scale


def compare(client: str, stock: Outcome, ours: Outcome) -> tuple[float, float, float]:
    """Assert that two trainings are the same, and that the second never retains more; the largest differences."""
    assert len(stock.losses) == len(ours.losses) > 0
    loss = max(abs(a - b) / max(abs(a), 1e-2) for a, b in zip(stock.losses, ours.losses, strict=True))
    gradient = farthest(stock.gradients(), ours.gradients())
    weight = max(farthest(stock.weights(), ours.weights()), farthest(stock.files(), ours.files()))
    more = [(a, b) for a, b in zip(stock.retained, ours.retained, strict=True) if b > a]
    print(client, loss, gradient, weight, stock.retained, ours.retained)
    assert loss <= 2e-5 and gradient <= 2e-5 and weight <= 1e-4, client
    assert not more, f"{client} retains more than stock PEFT"
    assert stock.configs() == ours.configs()
    return loss, gradient, weight


def side_by_side(
    client: str, name: str, names: Callable[[Path], dict[str, Any]], folder: Path, patch: pytest.MonkeyPatch
) -> tuple[Compared, dict[str, Outcome]]:
    """Train four times, compare, and return the line for the table."""
    done = trained(name, names, folder, patch)
    bound = compare(f"{client}, bound", done["stock"], done["bound"])
    frozen = compare(f"{client}, frozen", done["stock frozen"], done["ours"])
    freezer = done["ours"].freezer
    assert freezer is not None
    if freezer.config.target == "bytes":
        assert done["ours"].retained[-1] < done["bound"].retained[-1], "a target in bytes frees some"
    else:
        assert abs(len(freezer.frozen) - 0.75 * len(freezer.adapters)) <= 0.5, "three quarters are frozen"
    line = Compared(
        client,
        *(max(pair) for pair in zip(bound, frozen, strict=True)),
        len(done["ours"].files()),
        done["stock"].retained[-1],
        done["bound"].retained[-1],
        done["stock frozen"].retained[-1],
        done["ours"].retained[-1],
    )
    return line, done
