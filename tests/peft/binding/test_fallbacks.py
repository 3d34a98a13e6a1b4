"""One layer at a time: what takes the fast path, and what runs PEFT's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny import BERT_TARGETS, batches, bert, randomise_adapters
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safe_peft import bind
from safe_peft.binding.adapters.lora import refusal
from safe_peft.freezing.scores import find_score


def lora_layer(base: nn.Module | None = None, **options: Any) -> PeftLinear:
    """One bound LoRA layer inside a model of its own."""
    base = nn.Linear(16, 24) if base is None else base
    model = get_peft_model(nn.Sequential(base), LoraConfig(**{"r": 4, "target_modules": ["0"], **options}))  # type: ignore[arg-type]
    randomise_adapters(model)
    bind(model)
    layer = model.base_model.model[0]
    layer.owner = [model]  # in a list, which nn.Module does not look into
    return layer.train()


def with_second_adapter(layer: PeftLinear, **options: Any) -> PeftModel:
    model = layer.owner[0]
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], **options))
    return model


def test_the_plain_layer_takes_the_fast_path(fast_calls: list[Any]) -> None:
    layer = lora_layer(lora_dropout=0.5).eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x))
    assert len(fast_calls) == 1


def test_conv1d_takes_the_fast_path(fast_calls: list[Any]) -> None:
    layer = lora_layer(Conv1D(24, 16), fan_in_fan_out=True)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x))
    assert len(fast_calls) == 1


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Float8(nn.Linear):
    """As transformers' layers of 8-bit floats: a weight that is not of the dtype it computes in."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def over_a_subclass() -> PeftLinear:
    return lora_layer(Doubled(16, 24))


def over_float8() -> PeftLinear:
    layer = lora_layer(Float8(16, 24))
    layer.lora_A.float()  # PEFT 0.18 leaves the adapter in 8 bits, which nothing multiplies
    layer.lora_B.float()
    return layer


def over_a_parametrised_layer() -> PeftLinear:
    layer = lora_layer()
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    return layer


@pytest.mark.parametrize("make", [over_a_subclass, over_float8, over_a_parametrised_layer])
def test_any_base_layer_takes_the_fast_path_since_only_its_output_counts(
    make: Callable[[], PeftLinear], fast_calls: list[Any]
) -> None:
    layer, x = make(), torch.randn(3, 16)
    torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x))
    assert len(fast_calls) == 1
    (adapter,) = bind(layer.owner[0]).live_adapters()
    norm = find_score("relative_norm").function(adapter.evidence())
    assert math.isnan(norm) if make is over_float8 else norm > 0, "what 8-bit floats stand for only the layer knows"


def test_dropout_is_on_in_training_only_and_follows_the_seed() -> None:
    layer = lora_layer(lora_dropout=0.5)
    x = torch.randn(64, 16)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(layer(x), first)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_the_output_has_the_base_layers_dtype(x_dtype: torch.dtype) -> None:
    layer = lora_layer()
    layer.base_layer.to(x_dtype)
    x = torch.randn(3, 16, dtype=x_dtype)
    assert layer(x).dtype == x_dtype
    torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x))


def test_autocast_gives_what_peft_gives() -> None:
    layer = lora_layer()
    x = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = layer(x), PeftLinear.forward(layer, x)
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    ours.float().sum().backward()
    assert layer.lora_A["default"].weight.grad is not None


def test_torch_compile_gives_the_same() -> None:
    layer = lora_layer()
    x = torch.randn(3, 16)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


def dora_in_training() -> PeftLinear:
    layer = lora_layer(use_dora=True)
    layer.base_layer.weight.requires_grad_(True)
    return layer


def dora_with_a_hook() -> PeftLinear:
    layer = lora_layer(use_dora=True)
    layer.base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def dora_of_a_subclass() -> PeftLinear:
    layer = lora_layer(use_dora=True)
    layer.base_layer.__class__ = nn.modules.linear.NonDynamicallyQuantizableLinear
    return layer


def several_active(**options: Any) -> PeftLinear:
    layer = lora_layer()
    with_second_adapter(layer, **options)
    layer.set_adapter(["default", "second"])
    return layer


def several_with_dora() -> PeftLinear:
    return several_active(use_dora=True)


def several_of_two_dtypes() -> PeftLinear:
    layer = several_active()
    layer.lora_A["second"].bfloat16()
    layer.lora_B["second"].bfloat16()
    return layer


def none_active() -> PeftLinear:
    layer = lora_layer()
    layer.set_adapter("elsewhere")
    return layer


def merged() -> PeftLinear:
    layer = lora_layer()
    layer.merge()
    return layer


def disabled() -> PeftLinear:
    layer = lora_layer()
    layer.enable_adapters(False)
    return layer


def other_dropout() -> PeftLinear:
    layer = lora_layer(lora_dropout=0.5)
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)
    return layer


def hooked() -> PeftLinear:
    layer = lora_layer()
    layer.lora_B["default"].register_forward_hook(lambda module, args, out: 2 * out)
    return layer


def parametrised() -> PeftLinear:
    layer = lora_layer()
    nn.utils.parametrizations.weight_norm(layer.lora_A["default"])
    return layer


def without_a_parameter() -> PeftLinear:
    """As FSDP1 and pruning leave a layer: a tensor where the parameter was."""
    layer = lora_layer()
    lora_A = layer.lora_A["default"]
    weight = lora_A.weight.detach().clone()
    del lora_A.weight
    lora_A.weight = weight
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dora_in_training, "DoRA over a base weight that trains"),
        (dora_with_a_hook, "DoRA with hooks on the base layer or on the magnitude"),
        (dora_of_a_subclass, "DoRA over NonDynamicallyQuantizableLinear"),
        (several_with_dora, "several adapters are active, and one of them is a variant of LoRA"),
        (several_of_two_dtypes, "several adapters of different dtypes are active"),
        (none_active, "no active adapter in this layer"),
        (merged, "adapters are merged"),
        (disabled, "adapters are disabled"),
        (other_dropout, "dropout module AlphaDropout"),
        (hooked, "hooks on lora_A, lora_B or lora_dropout"),
        (parametrised, "adapter is made of ParametrizedLinear"),
        (without_a_parameter, "lora_A or lora_B is not an ordinary parameter"),
    ],
)
def test_what_is_not_covered_runs_pefts_own_path(
    make: Callable[[], PeftLinear], reason: str, fast_calls: list[Any]
) -> None:
    layer = make()
    assert refusal(layer) is not None and refusal(layer).startswith(reason)  # type: ignore[union-attr]
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), PeftLinear.forward(layer, x))
    assert not fast_calls


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("lora_B", "adapter dtype float32 and bfloat16"),
        ("bias", "bias of lora_B is not an ordinary parameter with lora_B's dtype"),
    ],
)
def test_an_adapter_of_two_dtypes_runs_pefts_own_path(part: str, reason: str, fast_calls: list[Any]) -> None:
    layer = lora_layer(lora_bias=part == "bias")
    lora_B = layer.lora_B["default"]
    if part == "bias":
        lora_B.bias.data = lora_B.bias.detach().bfloat16()
    else:
        lora_B.bfloat16()
    assert refusal(layer) == reason
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):  # the only way in which PyTorch multiplies the two
        assert torch.equal(layer(x), PeftLinear.forward(layer, x))
    assert not fast_calls


def test_adapter_names_run_pefts_own_path(fast_calls: list[Any]) -> None:
    layer = lora_layer()
    model = with_second_adapter(layer).eval()
    x, names = torch.randn(3, 16), ["default", "second", "__base__"]
    assert refusal(layer, (x,), {"adapter_names": names}) == "the call passes adapter_names"
    rows = layer(x, adapter_names=names)
    assert not fast_calls
    torch.testing.assert_close(rows[2], layer.base_layer(x[2]))
    torch.testing.assert_close(rows[0], model(x[0]))


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.ones(3, 16, dtype=torch.int64), "input is int64, strided"),
        (torch.ones(3, 16).to_sparse(), "input is float32, sparse_coo"),
        ([1.0], "input is a list, not a plain tensor"),
    ],
)
def test_an_input_that_is_no_dense_floating_point_tensor(x: object, reason: str) -> None:
    assert refusal(lora_layer(), (x,), {}) == reason


def test_casting_switched_off_is_left_to_peft() -> None:
    layer = lora_layer()
    layer.base_layer.bfloat16()
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    with disable_input_dtype_casting(layer.owner[0]):
        assert refusal(layer, (x,), {}) == "input and adapter differ in dtype, and casting is switched off"
        with pytest.raises(RuntimeError):
            layer(x)
    assert refusal(layer, (x,), {}) is None


def test_merge_and_unload_work_on_a_bound_model() -> None:
    model = bert(target_modules=BERT_TARGETS)
    randomise_adapters(model)
    bind(model)
    model.eval()
    batch = next(batches(1))
    expected = model(**batch).logits
    merged_model = model.merge_and_unload()
    assert not any(isinstance(module, PeftLinear) for module in merged_model.modules())
    torch.testing.assert_close(merged_model(**batch).logits, expected)


def test_an_adapter_added_later_is_served_too(fast_calls: list[Any]) -> None:
    layer = lora_layer()
    model = with_second_adapter(layer)
    model.set_adapter("second")
    randomise_adapters(model)
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x))
    assert fast_calls and fast_calls[0][3] is layer.lora_A["second"].weight
