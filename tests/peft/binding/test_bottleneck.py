"""Bottleneck adapters on the fast path, compared with the tuner in plain PyTorch."""

from __future__ import annotations

import copy
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import life_scripts  # noqa: F401  fills the table
import pytest
import torch
from adapted import adapted, adapted_bert, adapted_family
from blocks import retained
from families import family
from life import SCENARIOS, Failure, Scenario, assert_same, assert_same_files, outcome
from life import state as seen
from one_layer import ADAPTERS, D_IN, D_OUT, ROWS, One, assert_compiled, assert_stocks, batch, layer_of
from oracle import taking_turns
from peft import PeftModel
from ranks import together
from shares import OPTIONS, STEPS, digest, events, shares
from tiny import EARLY, adamw, batches, gpt2, run, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy import gradients

from safe_kernels import AdapterStatistics, RowBlocks
from safe_kernels.retention import measure
from safe_peft import AdapterFreezer, SafeConfig, bind, explain, plan_memory
from safe_peft.binding.adapters.bottleneck import refusal
from safe_peft.bottleneck import BottleneckLayer
from safe_peft.planning.inputs import Inputs
from safe_peft.planning.tracing import live_adapters, trace

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
NAMES = ("x", "down.weight", "down.bias", "up.weight", "up.bias")
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(6)))
HIDDEN = 5


def one(kind: str = "fp32", **options: Any) -> PeftModel:
    dtype, upcast = ADAPTERS[kind]
    torch.manual_seed(0)
    options = {"reduction_factor": D_OUT / HIDDEN, "target_modules": ["linear"], "scaling": 0.7, **options}
    model = adapted(One().to(dtype), **options)
    for name, p in model.named_parameters():
        if "bottleneck_" in name:
            p.data = p.data.to(torch.float32 if upcast else dtype)
    return model


def require(model: PeftModel, names: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            _, part, _, kind = name.replace("bottleneck_", "").rsplit(".", 3)
            parameter.requires_grad_(f"{part}.{kind}" in names)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_output_and_gradients(fast_calls: list[Any], kind: str, placement: str, names: tuple[str, ...]) -> None:
    model = one(kind, placement=placement, non_linearity="gelu")
    require(model, names)
    assert_stocks(model, batch(ADAPTERS[kind][0]).requires_grad_("x" in names), fast_calls)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(fast_calls: list[Any], kind: str, input_dtype: torch.dtype) -> None:
    assert_stocks(one(kind, non_linearity="silu"), batch(input_dtype).requires_grad_(), fast_calls, autocast=True)


@pytest.mark.parametrize("non_linearity", ["relu", "gelu", "gelu_new", "swish"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_whole_models(fast_calls: list[Any], name: str, placement: str, non_linearity: str) -> None:
    model, inputs = adapted_family(name, placement=placement, non_linearity=non_linearity), family(name).batch()
    found = []
    for bound in (False, True):
        with bind(model) if bound else torch.enable_grad():
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert len(fast_calls) == sum(isinstance(m, BottleneckLayer) for m in model.modules())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("placement", "non_linearity", "name", "autocast"),
    taking_turns(PLACEMENTS, ["relu", "gelu"], ["bert", "llama"], [False, True]),
)
def test_retained_bytes_and_their_plan(name: str, placement: str, non_linearity: str, autocast: bool) -> None:
    """Never more than the tuner in plain PyTorch; what freezing leaves is known before anything is frozen."""
    options = {"placement": placement, "non_linearity": non_linearity, "dropout": 0.1}
    inputs = family(name).batch()
    model, stock = (adapted_family(name, p=0.1, **options) for _ in range(2))
    names = [adapter.name for adapter in live_adapters(model)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        planned = Inputs.of(inputs, autocast=True)
        table = trace(model, planned).table
        for frozen in ([], names[: len(names) // 2], names[1:]):
            sizes = []
            for each, fast in ((model, True), (stock, False)):
                each = copy.deepcopy(each)
                for adapter in live_adapters(each):
                    if adapter.name in frozen:
                        adapter.freeze(keep_dropout=not fast)
                if fast:
                    bind(each)
                sizes.append(retained(each, inputs))
            told = trace(model, planned, frozen=frozen)
            assert sizes[0] == told.retained == told.table.bytes() <= sizes[1], frozen
            if autocast and placement == "parallel":  # a norm below which nothing trains: a 16-bit copy suffices
                assert sizes[0] <= table.bytes(frozen)
            else:
                assert sizes[0] == table.bytes(frozen)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_a_frozen_adapter_retains_is_foretold(wide: torch.dtype, narrow: torch.dtype, autocast: bool) -> None:
    model = one("fp32", non_linearity="gelu").to(wide)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            parameter.data = parameter.data.to(narrow)
    x = batch(wide).requires_grad_()
    (adapter,) = bind(model).live_adapters()
    adapter.freeze()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = measure(lambda: model(x), exclude=[model, x])
        cast_weight = D_IN * D_OUT * 2 if autocast and wide == torch.float32 else 0
        assert found.bytes - cast_weight == adapter.bytes_once_frozen(found.output)


def test_a_plan_gives_the_bytes_of_a_step() -> None:
    model, inputs = adapted_bert(dropout=0.1), next(batches(1))
    assert plan_memory(model, batch=inputs).ours.retained == _bound_bytes(model, inputs)


def _bound_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    with bind(model):
        return measure(lambda: model(**inputs).loss, exclude=[model, *inputs.values()]).bytes


def test_explain() -> None:
    model = adapted_bert()
    assert {row.reason for row in explain(model)} == {"not bound: bind(model) puts it on safe_kernels::bottleneck"}
    with bind(model):
        assert {(row.path, row.reason, row.state) for row in explain(model)} == {
            ("safe_kernels::bottleneck", "", "trainable")
        }


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_score_is_that_of_the_outputs_without_and_with_the_adapter(placement: str, dropout: float) -> None:
    model, x = one(placement=placement, dropout=dropout), batch()
    layer = layer_of(model)
    found = AdapterStatistics(blocks=RowBlocks.spread(ROWS, block_rows=8))
    expected = AdapterStatistics(blocks=found.blocks)
    with bind(model):
        layer.__dict__["_safe_state"].observe["default"] = lambda _: found
        out = layer(x)
    base, counts = expected.take(layer.base_layer(x))
    expected.add_features(base, expected.take(out)[0], counts)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=0)
    assert expected.one_minus_cka() > 1e-4


@pytest.mark.parametrize("score", ["cka", "relative_norm", "drift", "gradient_sensitivity", "velocity", "progress"])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_a_schedule_freezes_them(placement: str, score: str) -> None:
    model, optimizer, freezer, _ = run(model=adapted_bert(placement=placement, dropout=0.1), score=score)
    assert len(freezer.frozen) == round(0.75 * len(freezer.adapters)) and not freezer.unscored
    frozen = [p for a in freezer.adapters if a.name in freezer.frozen for p in a.parameters()]
    assert {p.dim() for p in frozen} == {1, 2}, "the biases too"
    model.set_adapter("default")  # PEFT thaws them
    before = [p.detach().clone() for p in frozen]
    train(model, optimizer, batches(2), freezer)
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, frozen, strict=True))


def test_relative_norm_is_compared_with_the_identity() -> None:
    model = adapted_bert(scaling=0.5)
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(score="relative_norm", **EARLY))
    freezer.step()
    for adapter in freezer.adapters:
        product = 0.5 * adapter.pair()[1] @ adapter.pair()[0]
        assert freezer.ledger.importance[adapter.name] == pytest.approx(float(product.norm()) / 32**0.5, rel=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_training_is_the_tuners(placement: str) -> None:
    losses = []
    for bound in (False, True):
        model = adapted_bert(placement=placement)
        keys = set(model.state_dict())
        if bound:
            bind(model)
        losses.append(train(model, adamw(model), batches(6)))
        assert set(model.state_dict()) == keys
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("names", [NAMES, ("x",)], ids="+".join)
def test_compiled_whole(placement: str, names: tuple[str, ...]) -> None:
    model = one(placement=placement)
    require(model, names)
    assert_compiled(model, batch().requires_grad_(), len(names) + 1)


LIFE = "use_it ask_about_it disable_adapters save_and_load copy_it switch_modes checkpoint_activations unload "
LIFE += "move_to_other_dtypes move_to_another_device set_an_adapter_that_is_not_there pass_state_dicts"


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("script", [s for s in SCENARIOS if str(s) in LIFE.split()], ids=str)
def test_a_script_gives_the_same_on_a_bound_model(script: Scenario, placement: str, tmp_path: Path) -> None:
    stock, bound = (adapted(gpt2().unload(), placement=placement).eval() for _ in range(2))
    bind(bound)
    expected = outcome(script, stock, tmp_path / "stock")
    assert script.fails == (expected.kind if isinstance(expected, Failure) else "")
    assert_same(outcome(script, bound, tmp_path / "bound"), expected)
    assert_same_files(tmp_path / "bound", tmp_path / "stock")
    assert_same(seen(bound), seen(stock))


# ---------------------------------------------------------------- the adapter's own path


def several(model: PeftModel) -> None:
    layer = layer_of(model)
    layer.update_layer("second", model.peft_config["default"])
    layer.set_adapter(["default", "second"])


def hooked(model: PeftModel) -> None:
    layer_of(model).bottleneck_up["default"].register_forward_hook(lambda *args: None)


def replaced(model: PeftModel) -> None:
    layer = layer_of(model)
    layer.forward = lambda *args, **kwargs: BottleneckLayer.forward(layer, *args, **kwargs)


def mixed(model: PeftModel) -> None:
    layer_of(model).bottleneck_up["default"].double()


def tensor_scaling(model: PeftModel) -> None:
    layer_of(model).scaling["default"] = torch.ones(())


REFUSED = {
    "adapters are disabled": lambda model: layer_of(model).enable_adapters(False),
    "several bottleneck adapters are active": several,
    "hooks on the layers of the adapter": hooked,
    "forward is replaced on the layer itself": replaced,
    "adapter dtype float32 and float64": mixed,
    "scaling is a Tensor": tensor_scaling,
    "no active adapter in this layer": lambda model: setattr(layer_of(model), "_active_adapter", []),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_call_is_computed_by_the_tuner(fast_calls: list[Any], reason: str) -> None:
    model, x = one(placement="parallel"), batch()
    REFUSED[reason](model)
    bind(model)
    assert [row.reason.startswith(reason) and row.path == "peft" for row in explain(model)] == [True]
    plain = copy.deepcopy(model)
    results = []
    for each in (model, plain):
        try:
            results.append(each(x))
        except RuntimeError as refused:  # weights of two dtypes
            results.append(torch.tensor(len(str(refused))))
    assert torch.equal(*results)
    assert not fast_calls


def test_a_replaced_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(one())
    assert refusal(layer) is None
    monkeypatch.setattr(BottleneckLayer, "_add", lambda self, key, x, out: out)
    assert refusal(layer) == "BottleneckLayer._add is replaced"


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_several_active_adapters_are_scored_on_the_tuners_path(placement: str) -> None:
    model = adapted(gpt2().unload(), placement=placement)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.data.normal_(std=0.1)
    model.base_model.set_adapter(["default", "second"])
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    rows = [{**b, "labels": b["input_ids"]} for b in batches(3)]
    train(model, optimizer, iter(rows), freezer)
    assert len(freezer.ledger.importance) == (8 if placement == "houlsby" else 4)
    assert all(value > 1e-7 for value in freezer.ledger.importance.values())


# ---------------------------------------------------------------- resume, processes


class Loop:
    """A custom loop with a freezer, and all that a checkpoint holds."""

    def __init__(self) -> None:
        self.model = adapted_bert(dropout=0.1, non_linearity="gelu")
        self.optimizer = adamw(self.model)
        self.freezer = AdapterFreezer(self.model, self.optimizer, SafeConfig(target_fraction=0.5, **EARLY))

    def run(self, first: int, last: int) -> Loop:
        data = list(batches(last))
        for number in range(first, last):
            torch.manual_seed(number)
            train(self.model, self.optimizer, iter(data[number : number + 1]), self.freezer)
        return self

    def restarted(self) -> Loop:
        other = Loop()
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.freezer.load_state_dict(self.freezer.state_dict())
        return other


@pytest.mark.parametrize("stop", [3, 8, 14])
def test_a_resumed_training_ends_with_the_same_bits(stop: int) -> None:
    whole = Loop().run(0, stop)
    again = whole.restarted().run(stop, 16)
    whole.run(stop, 16)
    assert whole.freezer.ledger == again.freezer.ledger and whole.freezer.frozen
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def train_wrapped(rank: int, placement: str) -> dict[str, Any]:
    model = adapted_bert(placement=placement)
    ddp = DistributedDataParallel(model)
    optimizer = adamw(model)
    freezer = AdapterFreezer(ddp, optimizer, SafeConfig(**OPTIONS))
    losses = train(ddp, optimizer, shares(STEPS, rank, 2), freezer)
    return {"losses": losses, "events": events(freezer), "digest": digest(model)}


def test_two_processes_stay_equal() -> None:
    ranks = together(train_wrapped, "parallel")
    assert ranks[0]["events"] == ranks[1]["events"] and ranks[0]["digest"] == ranks[1]["digest"]
    assert ranks[0]["losses"] != ranks[1]["losses"], "each has its own half of the batch"
    assert ranks[0]["events"]
