"""GradScaler, accumulation, and torch's own switches around a training that freezes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny import adamw
from torch import Tensor, nn
from toy import Toy, freezer_of, gradients, pairs, toy

from safe_peft import AdapterFreezer, bind, explain

# ---------------------------------------------------------------- GradScaler


def plain(model: nn.Module) -> torch.optim.Optimizer:
    return adamw(model)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    """GradScaler leaves the division by its scale, and the decision to skip a step, to such an optimizer."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, fused=True)


def scaled_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[int], Any],
    *,
    scale: float = 256.0,
    overflows: tuple[int, ...] = (),
) -> list[float]:
    """Steps are counted from 1; in some of them the gradients are infinite, which makes the scaler skip the step."""
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=scale), []
    for step, batch in enumerate(pairs(16), start=1):
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch)
        scaler.scale(loss * float("inf") if step in overflows else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after_step(step)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimize", [plain, fused])
def test_a_scaled_training_is_that_of_stock_peft_frozen_by_hand(optimize: Callable[..., Any]) -> None:
    model, stock = toy(), toy()
    own, optimizer = optimize(model), optimize(stock)
    freezer = freezer_of(model, own)
    losses = scaled_training(model, own, lambda _: freezer.step(), overflows=(3, 9))
    frozen_at = {freezing.name: freezing.step for freezing in freezer.ledger.freezings}

    def freeze(step: int) -> None:
        for name in [name for name, at in frozen_at.items() if at == step]:
            layer = stock.get_submodule(f"base_model.model.{name}")
            for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                parameter.requires_grad_(False).grad = None
                optimizer.state.pop(parameter, None)

    assert losses == pytest.approx(scaled_training(stock, optimizer, freeze, overflows=(3, 9)), rel=2e-2)
    assert len(freezer.frozen) == 3
    assert freezer.metrics()["safe/step"] == 16, "a step that was skipped counts, as it does for the Trainer"


def importances(optimize: Callable[..., Any], score: str, **options: Any) -> dict[int, dict[str, float]]:
    model = toy()
    optimizer = optimize(model)
    freezer = freezer_of(model, optimizer, score=score, score_interval=1, target_fraction=0.0)
    scaled_training(model, optimizer, lambda _: freezer.step(), **options)
    return {scoring.step: scoring.importance for scoring in freezer.ledger.scorings}


@pytest.mark.parametrize("optimize", [plain, fused])
@pytest.mark.parametrize("score", ["cka", "gradient_sensitivity"])
def test_importance_does_not_depend_on_the_scale(score: str, optimize: Callable[..., Any]) -> None:
    low, high = (importances(optimize, score, scale=scale) for scale in (2.0**4, 2.0**8))
    assert low.keys() == high.keys() == set(range(1, 15))
    assert high[1] == pytest.approx(low[1], rel=2e-2)
    assert high[5] == pytest.approx(low[5], rel=5e-2)


@pytest.mark.parametrize("optimize", [plain, fused])
def test_a_scoring_by_gradients_waits_for_a_step_that_is_made(
    optimize: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    scorings = importances(optimize, "gradient_sensitivity", overflows=(2, 3))
    assert set(scorings) == {1, *range(4, 15)}
    assert all(value > 0 for importance in scorings.values() for value in importance.values())
    assert sum("step 2: the optimizer made no step" in record.message for record in caplog.records) == 1


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("score", ["cka", "gradient_sensitivity"])
def test_micro_batches_score_as_the_big_batch_does(score: str) -> None:
    """Where the row blocks are the same ones; 24 rows a micro-batch are three blocks of eight."""
    found = []
    for micro in (1, 4):
        model = toy()
        optimizer = adamw(model)
        freezer = freezer_of(model, optimizer, score=score, score_interval=1, score_blocks=100)
        for big in pairs(12, rows=96):
            for part in range(micro):
                batch = {name: tensor.chunk(micro)[part] for name, tensor in big.items()}
                (model(**batch) / micro).backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        found.append(freezer.ledger)
    big_ledger, ledger = found
    assert ledger.frozen == big_ledger.frozen
    assert ledger.frozen
    for scoring, expected in zip(ledger.scorings, big_ledger.scorings, strict=True):
        assert scoring.importance == pytest.approx(expected.importance, rel=1e-3)


# ---------------------------------------------------------------- torch's own switches


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SWITCHES: dict[str, Callable[[], Any]] = {
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic algorithms": deterministic,
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta by default": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_nothing(switch: str) -> None:
    losses, parts = [], []
    for context in (nullcontext, SWITCHES[switch]):
        model = toy(lora_dropout=0.1)
        batches = list(pairs(16))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(3)
        with context():
            freezer = freezer_of(model, optimizer)
            losses.append(_losses(model, optimizer, freezer, batches))
        parts.append(explain(model).parts)
    assert losses[0] == losses[1]
    assert parts[0] == parts[1], "everything is recognised"
    assert len(freezer.frozen) == 3


def _losses(model: nn.Module, optimizer: Any, freezer: AdapterFreezer, batches: list[dict[str, Tensor]]) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()
        losses.append(loss.item())
    return losses


def test_a_binding_made_under_autocast_recognises_everything() -> None:
    model = toy()
    with torch.autocast("cpu", torch.bfloat16), bind(model):
        inside = explain(model).parts
    with bind(model):
        assert explain(model).parts == inside
    assert {part.path for part in inside} == {"safe_kernels::layer_norm", "safe_kernels::activation"}


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_forwards_without_grad_in_the_middle_of_a_scoring_do_no_harm(switch: Callable[[], Any]) -> None:
    model = toy()
    optimizer = adamw(model)
    freezer = freezer_of(model, optimizer, score_interval=1)
    with switch():
        model(**next(pairs(1)))
    assert len(_losses(model, optimizer, freezer, list(pairs(16)))) == 16
    assert len(freezer.frozen) == 3


# ---------------------------------------------------------------- functorch


def functional(model: nn.Module) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def call(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x, target))

    return values, call


def test_functional_call_takes_the_fast_path(fast_calls: list[Any]) -> None:
    model, batch = toy(), next(pairs(1))
    bind(model)
    values, call = functional(model)
    for value in values.values():
        value.requires_grad_()
    call(values, **batch).backward()
    assert len(fast_calls) == 4
    model(**batch).backward()
    assert all(torch.equal(values[name].grad, grad) for name, grad in gradients(model).items())


def test_transforms_run_pefts_own_path(fast_calls: list[Any]) -> None:
    model, batch = toy(), next(pairs(1))
    values, call = functional(model)
    expected = torch.func.grad(call)(values, **batch)
    rows = {name: tensor.unflatten(0, (3, 8)) for name, tensor in batch.items()}
    per_sample = torch.func.vmap(torch.func.grad(call), (None, 0, 0))(values, rows["x"], rows["target"])
    tangents = torch.func.jvp(lambda x: call(values, x, batch["target"]), (batch["x"],), (batch["x"],))
    bind(model)
    got = torch.func.grad(call)(values, **batch)
    own_per_sample = torch.func.vmap(torch.func.grad(call), (None, 0, 0))(values, rows["x"], rows["target"])
    own_tangents = torch.func.jvp(lambda x: call(values, x, batch["target"]), (batch["x"],), (batch["x"],))
    assert not fast_calls
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(own_per_sample, per_sample)
    torch.testing.assert_close(own_tangents, tangents)


def test_forward_mode_without_functorch_is_refused() -> None:
    model, batch = toy(), next(pairs(1))
    bind(model)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(batch["x"], torch.ones_like(batch["x"]))
        with pytest.raises(NotImplementedError, match="x has a forward-mode tangent, but safe_kernels::layer_norm"):
            model(dual, batch["target"])


def test_a_second_derivative_is_refused() -> None:
    model, batch = toy(), next(pairs(1))
    bind(model)
    x = batch["x"].requires_grad_()
    (grad,) = torch.autograd.grad(model(**batch), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()
    assert isinstance(model.base_model.model, Toy)
