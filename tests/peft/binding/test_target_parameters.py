"""LoRA on experts' parameters: the changed weights are not retained, and everything else is as in stock PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from blocks import loss_and_gradients, retained
from experts import SHAPES, STACKED, adapted, language_model, mixture
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from recomputed import IDS
from tiny import batches, randomise_adapters
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu

from safe_kernels.retention import measure
from safe_peft import bind, explain
from safe_peft.binding.adapters import parameters
from safe_peft.planning.inputs import Inputs
from safe_peft.planning.tracing import trace

pytestmark = pytest.mark.skipif(parameters._Proxy is None, reason="this PEFT has no factors of the change")
BATCH = {"input_ids": IDS, "labels": IDS}
SENTENCES = next(batches(1))


def changed_bytes(model: nn.Module) -> int:
    """The bytes of the weights that adapters change."""
    layers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    return sum(layer.get_param().nbytes for layer in layers)


def with_embeddings(model: PeftModel, frozen: bool) -> PeftModel:
    """Train the embeddings too, so that a gradient passes through all experts, whose adapters may be frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" in name or ("lora_" in name and not frozen))
    return model


def gathered_bytes(model: PeftModel) -> int:
    """The bytes that the rows of the experts' inputs have more than these inputs, with two experts for each token."""
    layers = [module for name, module in model.named_modules() if name.endswith("experts")]
    return len(layers) * IDS.numel() * model.config.hidden_size * 4


def pair(make: Callable[[], PeftModel]) -> tuple[PeftModel, PeftModel]:
    stock, bound = make(), make()
    bind(bound)
    return stock, bound


def assert_as_stock(stock: PeftModel, bound: PeftModel, batch: dict[str, Tensor]) -> None:
    torch.testing.assert_close(loss_and_gradients(bound, batch), loss_and_gradients(stock, batch), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_changed_weights_are_not_retained(shape: str, implementation: str, frozen: bool) -> None:
    stock, bound = (with_embeddings(language_model(shape, implementation), frozen) for _ in range(2))
    bind(bound, parts=())
    assert_as_stock(stock, bound, BATCH)
    spared = changed_bytes(stock) + (gathered_bytes(stock) if STACKED and not frozen else 0)
    assert retained(bound, BATCH) == retained(stock, BATCH) - spared
    assert {row.reason for row in explain(bound)} == {
        "lora.ParamWrapper (target_parameters) has no kernel; backward makes the changed weight again"
    }


@pytest.mark.skipif(not STACKED, reason="GPT-OSS's experts read values of their inputs in this transformers")
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_with_the_base_in_16_bits(shape: str) -> None:
    """Its adapters are in fp32, so PEFT casts the factors: a frozen one retains nothing for that either."""
    model = language_model(shape).bfloat16()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.float() if "lora_" in name else parameter.data
    with_embeddings(model, frozen=True)
    stock = trace(model, Inputs.of(BATCH), fast=False)
    limit, planned = retained(model, BATCH) - changed_bytes(model), trace(model, Inputs.of(BATCH))
    with bind(model, parts=()):
        assert retained(model, BATCH) == limit
    with bind(model):
        assert retained(model, BATCH) == planned.retained < stock.retained


def disable(model: PeftModel) -> None:
    model.disable_adapter_layers()


def merge(model: PeftModel) -> None:
    model.merge_adapter()


def second(model: PeftModel) -> None:
    torch.manual_seed(1)
    model.add_adapter("second", LoraConfig(r=2, target_parameters=["experts.up", "experts.down"]))
    model.base_model.set_adapter(["default", "second"])
    randomise_adapters(model)


def write(model: PeftModel) -> None:
    model.get_submodule("base_model.model.experts").get_base_layer().factor = 2.0


@pytest.mark.parametrize("change", [disable, merge, second, write])
def test_other_calls_are_as_in_stock_peft(change: Callable[[PeftModel], None]) -> None:
    stock, bound = pair(mixture)
    for model in (stock, bound):
        change(model)
    assert_as_stock(stock, bound, SENTENCES)
    assert retained(bound, SENTENCES) <= retained(stock, SENTENCES)
    several = any("retains the changed weight: several adapters are active" in row.reason for row in explain(bound))
    assert several == (change is second)


def test_a_single_matrix_is_retained() -> None:
    stock, bound = pair(lambda: mixture(target_parameters=["experts.single"]))
    assert_as_stock(stock, bound, SENTENCES)
    assert retained(bound, SENTENCES) <= retained(stock, SENTENCES)
    assert "the parameter is one matrix" in explain(bound)["experts"].reason


def test_an_older_peft_retains_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "_Proxy", None)
    stock, bound = pair(mixture)
    assert_as_stock(stock, bound, SENTENCES)
    assert "this version of PEFT" in explain(bound)["experts"].reason


def test_a_replaced_method_of_peft_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(layer: ParamWrapper, key: str) -> Any:
        left, right, scaling = factors(layer, key)
        return left, right, 2 * scaling

    @contextmanager
    def recorded(layer: ParamWrapper, keys: list[str]) -> Iterator[None]:
        called.append(layer)
        with activate(layer, keys):
            yield

    called: list[ParamWrapper] = []
    factors, activate = ParamWrapper.get_delta_factors, ParamWrapper._activate_lora
    stock, bound = pair(mixture)
    plain = stock(**SENTENCES).loss
    monkeypatch.setattr(ParamWrapper, "get_delta_factors", twice)
    assert_as_stock(stock, bound, SENTENCES)
    assert bound(**SENTENCES).loss != plain
    monkeypatch.setattr(ParamWrapper, "_activate_lora", recorded)
    assert_as_stock(stock, bound, SENTENCES)
    assert len(called) == 4
    assert "ParamWrapper._activate_lora is replaced" in explain(bound)["experts"].reason


def test_hooks_of_others_get_what_autograd_saves() -> None:
    stock, bound = pair(mixture)
    with save_on_cpu():
        assert_as_stock(stock, bound, SENTENCES)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    models = pair(lambda: language_model("gpt-oss", "eager"))
    for model in models:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_as_stock(*models, BATCH)
    assert retained(models[1], BATCH) <= retained(models[0], BATCH)


def test_second_derivatives_are_stocks() -> None:
    def second_gradients(model: PeftModel) -> list[Tensor]:
        layer = model.get_submodule("base_model.model.experts")
        used = [layer.lora_A["default"].weight, layer.base_layer.lora_B["default"].weight]
        hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        first = torch.autograd.grad(layer(hidden).square().sum(), [hidden, *used], create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in first), used))

    stock, bound = pair(mixture)
    torch.testing.assert_close(second_gradients(bound), second_gradients(stock), rtol=1e-4, atol=1e-4)


def parts_of(model: PeftModel) -> dict[str, nn.Parameter]:
    layer = model.get_submodule("base_model.model.experts")
    own = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    return {**own, "W": getattr(layer.get_base_layer(), layer.parameter_name)}


@pytest.mark.parametrize("which", ["A", "B", "W"])
def test_a_write_before_backward_is_an_error(which: str) -> None:
    model = mixture()
    bind(model)
    loss = model(**SENTENCES).loss
    with torch.no_grad():
        parts_of(model)[which].mul_(2.0)
    with pytest.raises(RuntimeError, match=r"inplace operation(.|\n)*Change these after backward"):
        loss.backward()


def test_a_merge_before_backward_is_an_error() -> None:
    """It writes through .data, which no version counts."""
    model = mixture()
    bind(model)
    loss = model(**SENTENCES).loss
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="was merged into the base weight before backward"):
        loss.backward()


def test_new_data_of_a_parameter_leaves_the_gradients() -> None:
    found = []
    for model in pair(mixture):
        loss = model(**SENTENCES).loss
        for parameter in parts_of(model).values():
            parameter.data = torch.zeros_like(parameter)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-7)


class Selective(nn.Module):
    """Experts that read a few rows, and may write into their input after they have read it."""

    def __init__(self, rows: int, writes: bool) -> None:
        super().__init__()
        self.rows, self.writes = torch.arange(rows), writes
        self.weight = nn.Parameter(torch.empty(2, 16, 16))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [hidden[self.rows] @ self.weight[e] for e in range(2)]
        return torch.cat([*parts, hidden.mul_(2.0) if self.writes else hidden])


@pytest.mark.parametrize(("rows", "writes", "fewer"), [(2, False, False), (6, False, True), (6, True, False)])
def test_the_input_is_retained_instead_of_more_rows_of_it(rows: int, writes: bool, fewer: bool) -> None:
    torch.manual_seed(0)
    stock = adapted(nn.Sequential(Selective(rows, writes)), target_parameters=["0.weight"])
    bound = copy.deepcopy(stock)
    bind(bound)
    found = []
    for model in (stock, bound):
        leaf = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        measured = measure(lambda model=model, leaf=leaf: model(leaf * 1.0).square().sum(), exclude=model)
        measured.output.backward()
        found.append((measured.bytes, leaf.grad, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1][1:], found[0][1:])
    gathers = 2 * rows * 16 * 4
    spared = changed_bytes(stock) + (gathers - 8 * 16 * 4 if fewer else 0)
    assert found[1][0] == found[0][0] - spared


def in_chunks(experts: Any, hidden: Tensor) -> Tensor:
    if len(hidden) > 4:
        return torch.cat([experts(chunk) for chunk in hidden.split(4)])
    return torch.cat([hidden[torch.tensor([1, 0, 3, 2, 1])] @ matrix for matrix in experts.weight])


def with_one_index(experts: Any, hidden: Tensor) -> Tensor:
    rows, parts = torch.arange(6), []
    for matrix in experts.weight:
        parts.append(hidden[rows] @ matrix)
        rows.add_(2).remainder_(8)
    return torch.cat(parts)


def with_a_new_index(experts: Any, hidden: Tensor) -> Tensor:
    rows = torch.arange(6)
    read = hidden[rows]
    rows.add_(2)
    return torch.cat([read @ matrix for matrix in experts.weight])


def rows_twice(experts: Any, hidden: Tensor) -> Tensor:
    read = hidden[torch.arange(6)]
    return torch.cat([read @ matrix for matrix in experts.weight])


def rows_and_a_view(experts: Any, hidden: Tensor) -> Tensor:
    read, others = hidden[torch.arange(6)], hidden[torch.arange(6)]
    return torch.bmm(read[None], experts.weight[:1]) + read @ experts.weight[1] + others @ experts.weight[0]


def all_rows(experts: Any, hidden: Tensor) -> Tensor:
    return torch.cat([hidden[torch.arange(8)] @ matrix for matrix in experts.weight])


class Computed(nn.Module):
    def __init__(self, compute: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.weight = nn.Parameter(torch.empty(2, 16, 16))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.compute(self, hidden)


@pytest.mark.parametrize(
    ("compute", "columns"),
    [(f, 16) for f in (in_chunks, with_one_index, with_a_new_index, rows_twice, rows_and_a_view)] + [(all_rows, 64)],
)
def test_rows_that_the_input_cannot_spare(compute: Callable[[Any, Tensor], Tensor], columns: int) -> None:
    """Gradients are stock PEFT's, and no more is retained: of the input, its whole storage would be."""
    torch.manual_seed(0)
    stock = adapted(nn.Sequential(Computed(compute)), target_parameters=["0.weight"])
    bound = copy.deepcopy(stock)
    bind(bound)
    found = []
    for model in (stock, bound):
        whole = torch.randn(8, columns, generator=torch.Generator().manual_seed(0)).requires_grad_() * 1.0
        measured = measure(lambda model=model, x=whole[:, :16]: model(x).square().sum(), exclude=model)
        used = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((measured.bytes, torch.autograd.grad(measured.output, used)))
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][0] == found[0][0] - changed_bytes(stock)


def test_a_write_to_the_input_that_is_retained_is_an_error() -> None:
    """Stock PEFT retains the rows."""
    torch.manual_seed(0)
    model = adapted(nn.Sequential(Computed(all_rows)), target_parameters=["0.weight"])
    bind(model)
    hidden = torch.ones(8, 16, requires_grad=True) * 1.0
    loss = model(hidden).sum()
    hidden.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"inplace operation(.|\n)*Write to a clone of the input"):
        loss.backward()


def test_other_forwards_before_backward() -> None:
    """Each sets the base weight to itself, which is no write."""
    found = []
    for model in pair(mixture):
        first = model(**SENTENCES).loss
        with torch.no_grad():
            model(**SENTENCES)
        (first + model(**SENTENCES).loss.square()).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=1e-7)


def test_where_hooks_are_forbidden_all_is_as_in_stock_peft() -> None:
    stock, bound = pair(mixture)
    with disable_saved_tensors_hooks("no hooks"):
        assert_as_stock(stock, bound, SENTENCES)


def test_a_write_to_another_saved_tensor_is_stocks_error() -> None:
    for model in pair(mixture):
        hidden = torch.ones(2, 6, 16, requires_grad=True) * 1.0
        loss = model.get_submodule("base_model.model.experts")(hidden).sum()
        with torch.no_grad():
            hidden.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_copy_and_the_unbound_model_retain_as_stock_peft() -> None:
    stock, bound = mixture(), mixture()
    with bind(bound):
        assert retained(bound, SENTENCES) < retained(stock, SENTENCES) == retained(copy.deepcopy(bound), SENTENCES)
    assert retained(bound, SENTENCES) == retained(stock, SENTENCES)
