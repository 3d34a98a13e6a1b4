"""LoRA over quantised layers: what stock PEFT computes, and the retention contract without what the base retains."""

from __future__ import annotations

import copy
import logging
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import table
from peft.utils.integrations import dequantize_module_weight
from quantisers import KINDS, bnb_4bit, quantised_layer
from torch import Tensor, nn

import safe_peft
from safe_kernels.retention import measure
from safe_peft import bind, explain
from safe_peft.binding.adapters.quantised import QuantisedLora, _warn_once, refusal
from safe_peft.freezing.scores import find_score

kinds = pytest.mark.parametrize("kind", KINDS)
REAL = [kind for kind in KINDS if "stand-in" not in kind]


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of x, A and B."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return [out.detach(), *(tensor.grad for tensor in (x, *weights))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@kinds
def test_output_and_gradients_are_pefts(kind: str, dtype: torch.dtype, fast_calls: list[Any]) -> None:
    layer, x = quantised_layer(kind, dtype), inputs(dtype)
    stock = results(layer, x)
    bind(layer.owner[0])
    ours = results(layer, x)
    assert len(fast_calls) == 1
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for got, expected in zip(ours, stock, strict=True):
        assert got.dtype == expected.dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_and_the_compute_dtype_of_4_bits_may_differ(dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    layer = quantised_layer("bnb-4bit", dtype, lambda base: bnb_4bit(base, compute_dtype))
    stock = results(layer, inputs(dtype))
    bind(layer.owner[0])
    for got, expected in zip(results(layer, inputs(dtype)), stock, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@kinds
def test_autocast_gives_what_peft_gives(kind: str) -> None:
    layer = quantised_layer(kind)
    with torch.autocast("cpu", torch.bfloat16):
        stock = layer(inputs())
        bind(layer.owner[0])
        ours = layer(inputs())
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-int8", "hqq", "gptq-stand-in"])
def test_a_bound_layer_compiles_whole(kind: str) -> None:
    layer = quantised_layer(kind)
    bind(layer.owner[0])
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(inputs()), layer(inputs()))


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-int8", "hqq"])
def test_a_copy_is_an_ordinary_peft_model(kind: str) -> None:
    layer = quantised_layer(kind)
    model = layer.owner.pop()
    bind(model)
    copied = copy.deepcopy(model)
    assert type(copied.base_model.model[0]) is layer.original
    torch.testing.assert_close(copied(inputs()), model(inputs()))


# ---------------------------------------------------------------- what is retained


def storages_of(layer: nn.Module, x: Tensor) -> int:
    """The forward is given x * 1: as in a model, code that does not save it lets it go."""
    return measure(lambda: layer(x * 1), exclude=layer).bytes


ROWS_OF_THE_DOCS = {
    "bnb-4bit": "bitsandbytes, 4 bits",
    "bnb-8bit": "bitsandbytes, 8 bits",
    "torchao-int8": "torchao, int8 weights",
    "torchao-int8-dynamic": "torchao, int8 weights and dynamic activations",
    "torchao-int4": "torchao, intx weights of 4 bits",
    "hqq": "HQQ",
    "gptq-stand-in": "GPTQ",
    "awq-stand-in": "AWQ",
    "aqlm-stand-in": "AQLM",
}
RETAINED_BY_BASE = {
    "nothing": 0,
    "nothing: it dequantises again": 0,
    "its input, out of the hooks' sight": 0,
    "depends on the kernel": 0,  # the stand-ins retain nothing
    "**the dequantised weight**": 32 * 48 * 4,
    "its input and its bias": 3 * 5 * 32 * 4 + 48 * 4,  # HQQ's bias is no parameter
}
"""Bytes in fp32 on a CPU, by the words of docs/quantised.md."""


def said_of(kind: str) -> tuple[str, str, str]:
    """What the docs' table says that the base retains, whether a gradient passes, and of `relative_norm`."""
    _, retains, gradient, norm, _ = table("docs/quantised.md", "quantiser")[ROWS_OF_THE_DOCS[kind]]
    return retains, gradient, norm


@kinds
def test_beside_the_base_the_input_is_retained_once_and_nothing_once_frozen(kind: str) -> None:
    layer, x = quantised_layer(kind, lora_dropout=0.5), inputs()
    (adapter,) = bind(layer.owner[0]).live_adapters()
    said, _, _ = said_of(kind)
    base = RETAINED_BY_BASE[said]
    assert storages_of(layer.base_layer, x) == base
    own = 0 if said.startswith("its input and") else x.nbytes
    assert storages_of(layer, x) == base + own + 16
    adapter.freeze()
    assert storages_of(layer, x) == base


@pytest.mark.parametrize("kind", REAL)
def test_a_frozen_layers_input_is_freed_unless_the_base_keeps_it(kind: str) -> None:
    """bitsandbytes' 8 bits keep it where autograd's hooks do not see it: as an attribute of the node."""
    layer = quantised_layer(kind)
    (adapter,) = bind(layer.owner[0]).live_adapters()
    adapter.freeze()
    x = inputs() * 1
    alive = weakref.ref(x)
    out = layer(x)
    del x
    assert out.requires_grad
    assert (alive() is not None) == said_of(kind)[0].startswith("its input")


@kinds
def test_the_docs_say_whether_a_gradient_passes_and_a_weight_is_known(kind: str) -> None:
    layer = quantised_layer(kind)
    (adapter,) = bind(layer.owner[0]).live_adapters()
    layer(inputs())
    _, gradient, norm = said_of(kind)
    assert layer.base_layer(inputs()).requires_grad == {"yes": True, "**no**": False}[gradient]
    if kind == "torchao-int8-dynamic" and hasattr(layer.base_layer.weight, "input_quant_func"):
        norm = "nan"  # an older release, which does not dequantise them
    assert math.isnan(find_score("relative_norm").function(adapter.evidence())) == {"yes": False, "nan": True}[norm]


# ---------------------------------------------------------------- views and writing in place


@kinds
def test_the_bases_output_is_never_written_to_and_ours_may_be(kind: str) -> None:
    """PEFT clones it for 4 bits, against views that were written to; here the op's output is new anyway."""
    layer, x, seen = quantised_layer(kind), inputs(), []
    bind(layer.owner[0])
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append((out, out.detach().clone())))
    out = layer(x)
    ((base, before),) = seen
    assert out.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    out.mul_(2).add_(x.sum())
    (out + base).sum().backward()
    assert torch.equal(base, before)
    assert all(tensor.grad is not None for tensor in (x, layer.lora_A["default"].weight))


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4", "hqq"])
@pytest.mark.parametrize("called", [False, True])
def test_relative_norm_reads_the_dequantised_weight(kind: str, called: bool) -> None:
    layer = quantised_layer(kind)
    (adapter,) = bind(layer.owner[0]).live_adapters()
    if called:  # bitsandbytes moves the scales of its 8 bits in the first call
        layer(inputs())
    evidence = adapter.evidence()
    assert evidence.base_weight() is None, "a score that does not need it must not pay for it"
    score = find_score("relative_norm").function(evidence)
    weight = dequantize_module_weight(layer.base_layer)
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2.0
    assert score == pytest.approx((delta.norm() / weight.float().norm()).item(), rel=1e-5)


def packed() -> nn.Module:
    """As bitsandbytes leaves it after an evaluation on a CPU with AVX512-BF16."""
    layer = quantised_layer("bnb-4bit")
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    return layer


@pytest.mark.parametrize("make", [lambda: quantised_layer("gptq-stand-in"), packed], ids=["gptq", "packed"])
def test_relative_norm_cannot_be_told_where_no_weight_is_to_be_had(make: Callable[[], nn.Module]) -> None:
    layer = make()
    (adapter,) = bind(layer.owner[0]).live_adapters()
    assert math.isnan(find_score("relative_norm").function(adapter.evidence()))


# ---------------------------------------------------------------- refusals


@kinds
def test_a_merged_or_switched_off_adapter_runs_pefts_own_path(kind: str, fast_calls: list[Any]) -> None:
    layer = quantised_layer(kind)
    bind(layer.owner[0])
    layer.enable_adapters(False)
    assert refusal(layer) == "adapters are disabled"
    assert torch.equal(layer(inputs()), layer.base_layer(inputs()))
    assert not fast_calls


def test_dora_runs_pefts_own_path_and_freezes_all_the_same(fast_calls: list[Any]) -> None:
    layer = quantised_layer("bnb-4bit", use_dora=True)
    stock = results(layer, inputs())
    (adapter,) = bind(layer.owner[0]).live_adapters()
    assert refusal(layer) == "DoRA over Linear4bit"
    for got, expected in zip(results(layer, inputs()), stock, strict=True):
        assert torch.equal(got, expected)
    adapter.freeze()
    layer(inputs()).sum().backward()
    assert all(parameter.grad is None for parameter in adapter.parameters()) and not fast_calls


def test_two_halves_under_autocast_are_left_to_peft() -> None:
    layer, x = quantised_layer("bnb-4bit", torch.float16), inputs(torch.float16)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        assert refusal(layer, (x,)) == "input is float16 under autocast to bfloat16"
        assert refusal(layer, (x.float(),)) is None
        assert refusal(layer, (x.bfloat16(),)) is None
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_passes_no_gradient_is_named_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    layer, x = quantised_layer(kind), inputs()
    passes = layer.base_layer(x).requires_grad
    model = layer.owner[0]
    bind(model)
    _warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "safe_peft"):
        layer(x), layer(x)
    expected = "" if passes else "torchao quantises the activations; the base passes no gradient to its input"
    assert explain(model)["0"].reason == expected
    assert len([record for record in caplog.records if expected in record.message]) == (not passes)
    assert passes == (kind != "torchao-int8-dynamic")


def test_a_packed_weight_is_named() -> None:
    layer = packed()
    bind(layer.owner[0])
    assert "packed the weight at an evaluation" in explain(layer.owner[0])["0"].reason


def test_no_quantiser_is_imported_by_the_package() -> None:
    pattern = re.compile(r"^\s*(?:from|import) (?:bitsandbytes|torchao|hqq|gptqmodel|aqlm)\b", re.MULTILINE)
    assert pattern.search("    import torchao\n")
    sources = list(Path(safe_peft.__file__).parent.rglob("*.py"))
    assert sources and not [path.name for path in sources if pattern.search(path.read_text(encoding="utf-8"))]


@kinds
def test_explain_names_the_layer_and_its_path(kind: str) -> None:
    model = quantised_layer(kind).owner[0]
    assert "bind(model) puts it on" in explain(model)["0"].reason
    bind(model)
    row = explain(model)["0"]
    assert row.path == "safe_kernels::lora"
    assert row.kind.removeprefix("lora.") in [name.split(".")[-1] for name in QuantisedLora.layer_names]
