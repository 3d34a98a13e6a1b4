"""A plain layer in one op with its adapter, compared with stock PEFT and with the two apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from blocks import error
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adamw, batches, bert, randomise_adapters, run, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import gradients, pairs, toy

import safe_kernels
from safe_kernels.retention import measure
from safe_peft import bind, explain, plan_memory
from safe_peft.binding.adapters import lora as adapters

FUSED, APART = "safe_kernels::lora_linear", "safe_kernels::lora"
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(6)))
D_IN, D_OUT, ROWS = 24, 20, 33


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every call of the one op."""
    calls: list[tuple[Any, ...]] = []
    real = safe_kernels.lora_linear

    def recorded(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(safe_kernels, "lora_linear", recorded)
    return calls


@pytest.fixture
def in_one(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches the one op off, as hooks on a base layer do, and on again."""
    plain = adapters._plain
    return lambda is_on: monkeypatch.setattr(adapters, "_plain", plain if is_on else lambda *_: None)


class One(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one(bias: bool = True, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], **lora)
    model = get_peft_model(One(bias), config, autocast_adapter_dtype=False).to(dtype).train()
    randomise_adapters(model)
    return model


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model.linear


def require(model: PeftModel, names: tuple[str, ...]) -> None:
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad_("weight" in names)
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.requires_grad_("bias" in names)
    layer.lora_A["default"].weight.requires_grad_("lora_A" in names)
    layer.lora_B["default"].weight.requires_grad_("lora_B" in names)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, ROWS // 3, D_IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one call; the same dropout each time."""
    torch.manual_seed(11)
    leaf = x.detach().requires_grad_(x.requires_grad)
    out = model(leaf)
    if out.requires_grad:
        out.backward(torch.sin(torch.arange(out.numel())).reshape(out.shape).to(out.dtype))
    found = {"out": out.detach(), **gradients(model)}
    return found if leaf.grad is None else {**found, "x": leaf.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_output_and_gradients_are_stock_pefts(
    asked: list[tuple[Any, ...]], dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    model, x = one(dtype=dtype), batch(dtype).requires_grad_("x" in names)
    require(model, names)
    truth = step(copy.deepcopy(model).double(), x.detach().double().requires_grad_(x.requires_grad))
    stock = step(model, x)
    with bind(model):
        ours = step(model, x)
    assert len(asked) == 1
    assert {name: (v.shape, v.dtype) for name, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in stock.items()}
    rounding = torch.finfo(dtype).eps
    for name, value in ours.items():
        assert error(value, truth[name]) <= 2 * error(stock[name], truth[name]) + rounding, name


@pytest.mark.parametrize(
    ("names", "bias", "p"),
    [*((names, True, 0.3) for names in SUBSETS), (NAMES, True, 0.0), (("x", "weight", "lora_A", "lora_B"), False, 0.3)],
)
def test_it_retains_no_more_than_the_two_apart_and_drops_the_same(
    in_one: Callable[[bool], None], names: tuple[str, ...], bias: bool, p: float
) -> None:
    model, x = one(bias, lora_dropout=p), batch().requires_grad_("x" in names)
    require(model, names)
    retained, found = [], []
    with bind(model):
        for is_on in (False, True):
            in_one(is_on)
            retained.append(measure(lambda: model(x), exclude=model).bytes)
            found.append(step(model, x))
    # Where the base weight trains x is kept anyway, and x A' need not be.
    lora_b_alone = "lora_B" in names and "lora_A" not in names
    assert retained[1] <= retained[0] if lora_b_alone else retained[1] == retained[0]
    for name, value in found[1].items():
        assert error(value, found[0][name]) < 1e-6, name
    assert set(found[0]) == set(found[1])


def test_a_schedule_scores_and_freezes_alike(in_one: Callable[[bool], None]) -> None:
    results = []
    for is_on in (False, True):
        in_one(is_on)
        model = bert(1, lora_dropout=0.1)
        torch.manual_seed(5)
        *_, freezer, losses = run(model=model)
        results.append((losses, freezer.ledger, {row.path for row in explain(model)}, set(model.state_dict())))
    (losses, ledger, path, keys), (own_losses, own, own_path, own_keys) = results
    assert own_losses == pytest.approx(losses, rel=1e-4)
    assert own.frozen == ledger.frozen
    assert len(own.frozen) > 0
    for ours, theirs in zip(own.scorings, ledger.scorings, strict=True):
        assert ours.importance == pytest.approx(theirs.importance, rel=1e-3, abs=1e-9)
    assert (path, own_path) == ({APART}, {FUSED})
    assert own_keys == keys


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(asked: list[tuple[Any, ...]], reentrant: bool) -> None:
    model = toy(lora_dropout=0.2)
    inputs = {name: tensor.requires_grad_(name == "x") for name, tensor in next(pairs(1)).items()}
    found = []
    with bind(model):
        for around in (lambda block, x: block(x), lambda block, x: checkpoint(block, x, use_reentrant=reentrant)):
            model.base_model.model.around = around
            torch.manual_seed(2)
            model(**inputs).backward()
            found.append(gradients(model))
    assert len(asked) == 4 + 8
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_compiled_whole() -> None:
    """The compiled code has the one op. The choice does not depend on the device."""
    model, inputs, called = toy(1), next(pairs(1)), list[str]()

    def backend(graph: Any, example: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "lora" in str(node.target))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    with bind(model):
        model(**inputs).backward()
        expected = gradients(model)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(2):
            compiled(**inputs).backward()
            found = gradients(model)
            assert set(found) == set(expected)
            assert all(error(value, expected[name]) < 1e-6 for name, value in found.items())
    assert [name for name in called if "safe_kernels" in name] == 2 * ["safe_kernels.lora_linear"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_plan_traces_the_one_op(asked: list[tuple[Any, ...]], device: str) -> None:
    plan_memory(toy(1), batch=next(pairs(1)), device=device)
    assert len(asked) == 2


def test_what_the_adapter_does_not_do_takes_pefts_path(asked: list[tuple[Any, ...]]) -> None:
    model, x = one(), batch()
    with bind(model):
        with model.disable_adapter():
            assert torch.equal(model(x), layer_of(model).base_layer(x))
        assert asked == []
        model(x)
        assert explain(model)["linear"].path == FUSED
        model.merge_adapter()
        merged = model(x).detach()
        assert len(asked) == 1
        assert explain(model)["linear"].path == "peft"
        model.unmerge_adapter()
        assert error(model(x).detach(), merged) < 1e-5


def test_explain_names_the_op_of_the_last_call(in_one: Callable[[bool], None]) -> None:
    model = one()
    with bind(model):
        assert explain(model)["linear"].path == APART
        for is_on, path in ((True, FUSED), (False, APART)):
            in_one(is_on)
            model(batch())
            assert explain(model)["linear"].path == path
        assert f"1 by {APART}" in str(explain(model))


def test_a_frozen_adapter_stays_frozen_and_retains_nothing(asked: list[tuple[Any, ...]]) -> None:
    model, x = one(), batch().requires_grad_()
    with bind(model) as binding:
        (adapter,) = binding.live_adapters()
        adapter.freeze()
        layer_of(model).lora_A["default"].weight.requires_grad_(True)  # behind the ledger's back, as PEFT does
        retained = measure(lambda: model(x), exclude=model)
        retained.output.sum().backward()
    assert asked
    assert retained.bytes == 0
    assert layer_of(model).lora_A["default"].weight.grad is None


class Doubled(nn.Linear):
    """Computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(base: nn.Module) -> None:
    base.register_forward_hook(lambda *_: None)


def replaced(base: nn.Module) -> None:
    base.forward = base.forward  # type: ignore[method-assign]


def subclassed(base: nn.Module) -> None:
    base.__class__ = Doubled


def of_another_dtype(base: nn.Module) -> None:
    base.to(torch.bfloat16)
    base.register_forward_pre_hook(lambda _, args: (args[0].to(torch.bfloat16),))


def not_a_parameter(base: nn.Module) -> None:
    weight = base.weight.detach()
    del base.weight
    base.weight = weight


@pytest.mark.parametrize("change", [hooked, replaced, subclassed, of_another_dtype, not_a_parameter])
def test_a_base_that_does_more_or_other_than_a_linear_layer_is_called(
    asked: list[tuple[Any, ...]], change: Callable[[nn.Module], None]
) -> None:
    model, x = one(), batch()
    change(layer_of(model).base_layer)
    stock = model(x)
    with bind(model):
        assert error(model(x), stock) < 1e-2
    assert asked == []


def test_under_autocast_the_base_is_called(asked: list[tuple[Any, ...]]) -> None:
    model = one()
    with bind(model), torch.autocast("cpu", torch.bfloat16):
        assert model(batch()).dtype == torch.bfloat16
    assert asked == []


def test_training() -> None:
    model = bert(1)
    with bind(model):
        train(model, adamw(model), batches(1))
        assert {row.path for row in explain(model)} == {FUSED}
