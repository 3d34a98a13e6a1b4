"""Whatever optimizer trains them: an adapter that froze does not move, has no state, and the rest trains as in PEFT."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from tiny import EARLY, adamw, batches, bert
from tiny import train as train_tiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy import Toy, freezer_of, pairs, toy

from safe_peft import AdapterFreezer, BindingError, ConfigError, SafeConfig
from safe_peft.binding.class_swap import is_bound
from safe_peft.freezing.optimizer_state import Optimizers

STEPS = 18
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=3e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-3),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """One step in the form that every optimizer takes."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        return loss

    return optimizer.step(closure).item()  # type: ignore[union-attr]


def frozen_parameters(freezer: AdapterFreezer) -> Iterator[nn.Parameter]:
    for adapter in freezer.adapters:
        if adapter.name in freezer.frozen:
            yield from adapter.parameters()


class Stillness:
    """Asserts after every step that what is frozen stays as it was."""

    def __init__(self, freezer: AdapterFreezer) -> None:
        self.freezer = freezer
        self.known: dict[nn.Parameter, Tensor] = {}

    def check(self, *states: Any) -> None:
        for parameter in frozen_parameters(self.freezer):
            before = self.known.setdefault(parameter, parameter.detach().clone())
            assert torch.equal(parameter, before), "it moved"
            assert parameter.grad is None
            assert not any(state.get(parameter) for state in states), "it has state"


def freeze_by_hand(stock: nn.Module, names: list[str], optimizer: torch.optim.Optimizer) -> None:
    for name in names:
        layer = stock.get_submodule(f"base_model.model.{name}")
        for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            parameter.requires_grad_(False).grad = None
            optimizer.state.pop(parameter, None)
    if names and isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()  # it is of all parameters at once


def compare(
    make: Callable[[], nn.Module],
    optimize: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    dtype: torch.dtype,
    rel: float,
) -> torch.optim.Optimizer:
    """Train as stock PEFT does with the same adapters frozen by hand; the optimizer that trained ours."""
    model, stock = make().to(dtype), make().to(dtype)
    optimizer, own = (optimize(trainable(one)) for one in (stock, model))
    freezer = freezer_of(model, own)
    still = Stillness(freezer)
    for single in pairs(STEPS):
        batch = {key: tensor.to(dtype) for key, tensor in single.items()}
        loss, expected = step(model, own, batch), step(stock, optimizer, batch)
        assert loss == pytest.approx(expected, rel=rel)
        freeze_by_hand(stock, freezer.step(), optimizer)
        still.check(*([] if isinstance(own, torch.optim.LBFGS) else [own.state]))
    assert abs(len(freezer.frozen) - 0.75 * len(freezer.adapters)) <= 0.5
    return own


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_stock_peft_frozen_by_hand(name: str) -> None:
    compare(lambda: toy(3), OPTIMIZERS[name], torch.float64, rel=1e-6)


def test_gradients_that_a_closure_makes_are_scored() -> None:
    importances = []
    for optimize in (lambda p: torch.optim.SGD(p, lr=0.01), lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3)):
        model = toy()
        optimizer = optimize(trainable(model))
        freezer = freezer_of(model, optimizer, score="gradient_sensitivity", score_interval=1)
        step(model, optimizer, next(pairs(1)))
        freezer.step()
        importances.append(freezer.ledger.importance)
    assert importances[0] == importances[1], "the first evaluation is made before anything moves"
    assert len(importances[0]) == 4
    assert all(value > 0 for value in importances[0].values())


class Lookahead:
    """As several packages have it: slow weights of every parameter, pulled after every third step of another."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self.steps = 0

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        for parameter in [p for group in self.param_groups for p in group["params"]]:
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            if self.steps % 3 == 0:
                slow.lerp_(parameter, 0.5)
                parameter.copy_(slow)


def train(model: nn.Module, optimizer: Any, freezer: AdapterFreezer, *states: Any) -> None:
    still = Stillness(freezer)
    for batch in pairs(STEPS):
        model(**batch).backward()
        optimizer.step()
        still.check(*states[:1])
        optimizer.zero_grad()
        freezer.step()
        still.check(*states)
    assert len(freezer.frozen) == 3


def test_a_wrapper_with_weights_of_its_own() -> None:
    model = toy()
    inner = torch.optim.AdamW(trainable(model), lr=3e-3)
    wrapper = Lookahead(inner)
    train(model, wrapper, freezer_of(model, wrapper), inner.state, wrapper.state)  # type: ignore[arg-type]


def test_an_optimizer_that_accelerate_prepared() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = toy()
    inner = torch.optim.AdamW(trainable(model), lr=3e-3)
    prepared = accelerator.prepare(inner)
    train(model, prepared, freezer_of(model, prepared), inner.state)


def test_one_optimizer_a_parameter_stepping_inside_backward() -> None:
    model = toy()
    optimizers = {p: torch.optim.AdamW([p], lr=3e-3, weight_decay=0.1) for p in trainable(model)}

    def step_at_once(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step_at_once)
    freezer = freezer_of(model, list(optimizers.values()))
    still = Stillness(freezer)
    for batch in pairs(STEPS):
        model(**batch).backward()
        freezer.step()
        still.check(*(optimizer.state for optimizer in optimizers.values()))
    assert len(freezer.frozen) == 3
    freezer.detach()
    with pytest.raises(ConfigError, match="'gradient_sensitivity' reads gradients and needs exactly one optimizer"):
        freezer_of(model, list(optimizers.values()), score="gradient_sensitivity")


def test_pages_that_are_listed_a_second_time_are_released() -> None:
    """A stand-in for bitsandbytes' paged optimizers, which page on a GPU only."""
    kept, gone = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer: Any = torch.optim.SGD([kept, gone], lr=0.1)
    optimizer.state |= {p: {"state1": torch.zeros(2), "step": 1} for p in (kept, gone)}
    optimizer.page_mng = SimpleNamespace(paged_tensors=[optimizer.state[p]["state1"] for p in (kept, gone)])
    Optimizers(optimizer).forget([gone])
    assert list(optimizer.state) == [kept]
    assert [id(page) for page in optimizer.page_mng.paged_tensors] == [id(optimizer.state[kept]["state1"])]


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_bitsandbytes(name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `dev` may be without it")
    optimizer = compare(
        toy, lambda p: getattr(bitsandbytes.optim, name)(p, lr=1e-3, min_8bit_size=1), torch.float32, rel=1e-4
    )
    assert optimizer.state and {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchao(name: str) -> None:
    optim = pytest.importorskip("torchao.optim", reason="the extra `dev` may be without it")
    wide = {"r": 512, "lora_alpha": 512}  # for an adapter's 4,096 values, since smaller ones keep states of 32 bits
    with torch.compiler.set_stance("force_eager"):  # its steps compile themselves
        optimizer = compare(
            lambda: toy(**wide), lambda p: getattr(optim, name)(p, lr=1e-4, block_size=128), torch.float32, rel=1e-4
        )
    kinds = {type(state["exp_avg"]).__name__ for state in optimizer.state.values()}
    assert any(kind.startswith("OptimState") for kind in kinds), kinds


@pytest.mark.parametrize("foreach", [False, True])
def test_clipping_over_frozen_parameters_too(foreach: bool) -> None:
    norms = []
    for bound in (False, True):
        model = toy()
        everything = trainable(model)
        optimizer = torch.optim.SGD(everything, lr=0.1)
        adapters = [m for m in model.modules() if hasattr(m, "lora_A")]
        if bound:
            freezer = freezer_of(model, optimizer)
            freezer.adapters[1].freeze()
        else:
            adapters[1].requires_grad_(False)
        model(**next(pairs(1))).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(everything, 1e-3, foreach=foreach))
        after = torch.nn.utils.get_total_norm([p.grad for p in everything if p.grad is not None])
        assert float(after) == pytest.approx(1e-3, rel=1e-2)
    torch.testing.assert_close(norms[0], norms[1])


def test_a_moving_average_of_the_model() -> None:
    model = toy()
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    freezer = freezer_of(model, optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    by_hand: dict[str, Tensor] = {}
    for batch in pairs(STEPS):
        step(model, optimizer, batch)
        freezer.step()
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            by_hand[name] = by_hand.get(name, parameter.detach()).lerp(parameter.detach(), 0.5)
    assert len(freezer.frozen) == 3
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand[name])
    copied = average.module
    freezer.detach()
    model.load_state_dict(copied.state_dict())
    batch = next(pairs(1))
    assert type(copied.base_model.model) is Toy
    torch.testing.assert_close(copied(**batch), model(**batch))


# ---------------------------------------------------------------- PEFT's LoRA-FA, and adapters that share a parameter


def lorafa() -> tuple[Any, Any, AdapterFreezer]:
    model = bert()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    return model, optimizer, AdapterFreezer(model, optimizer, SafeConfig(**EARLY, score="random"))


def lora_bytes(freezer: AdapterFreezer, frozen: bool) -> dict[str, Tensor]:
    chosen = [adapter for adapter in freezer.adapters if (adapter.name in freezer.frozen) is frozen]
    return {f"{a.name}.{i}": p.detach().clone() for a in chosen for i, p in enumerate(a.parameters())}


def test_lorafa_goes_on_without_the_frozen_pairs() -> None:
    model, optimizer, freezer = lorafa()
    count = len(optimizer.param_groups[0]["params"])
    train_tiny(model, optimizer, batches(8), freezer)
    assert freezer.frozen
    still, moving = lora_bytes(freezer, True), lora_bytes(freezer, False)
    for batch in batches(1):
        model(**batch).loss.backward()
        optimizer.step()
    torch.testing.assert_close(lora_bytes(freezer, True), still, rtol=0, atol=0)
    now = lora_bytes(freezer, False)
    assert sum(not torch.equal(now[name], moving[name]) for name in moving) == len(moving) / 2, "every lora_B"
    (group,) = optimizer.param_groups
    assert len({len(group["names"]), *(len(value) for value in group.values() if isinstance(value, list))}) == 1
    assert len(group["params"]) == count - 2 * len(freezer.frozen)
    freezer.detach()
    assert len(group["params"]) == count
    names = [name for name in group["names"] if "lora" in name]
    assert [name.replace("lora_A", "lora_B") for name in names[::2]] == names[1::2], "it takes them in pairs"


def test_adapters_that_share_a_parameter_are_refused() -> None:
    model = bert()
    layers = [module for module in model.modules() if hasattr(module, "lora_A") and module.in_features == 32]
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    with pytest.raises(BindingError, match=r"layer\.0\.attention\.self\.query and .*key share a trainable parameter"):
        AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    assert not any(is_bound(module) for module in model.modules())
    spared = ("*layer.0.attention.self.query", "*layer.0.attention.self.key")
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY, never_freeze=spared))
    assert len(freezer.adapters) == 12
