"""LoRA on convolutions on the fast path, compared with stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from one_layer import ADAPTERS, assert_compiled, assert_pefts_if_merged_or_disabled, assert_stocks, step
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from tiny import randomise_adapters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safe_kernels import AdapterStatistics, RowBlocks
from safe_kernels.retention import measure
from safe_peft import bind, explain
from safe_peft.binding.adapters.conv import refusal

NAMES = ("x", "bias", "lora_A", "lora_B")
SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(5)))
D_IN, D_OUT, SIZE = 6, 8, (5, 4)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(D_IN, D_OUT, 3, padding=1),
    "1x1": lambda: nn.Conv2d(D_IN, D_OUT, 1, bias=False),
    "strides": lambda: nn.Conv2d(D_IN, D_OUT, (3, 2), stride=2, padding=(1, 0)),
    "groups": lambda: nn.Conv2d(D_IN, D_OUT, 3, groups=2),
    "dilated 1x1": lambda: nn.Conv2d(D_IN, D_OUT, 1, dilation=2),
    "1d": lambda: nn.Conv1d(D_IN, D_OUT, 3, padding=1),
    "3d": lambda: nn.Conv3d(D_IN, D_OUT, (1, 3, 3), padding=1),
}


class One(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def one(layer: str | nn.Module = "3x3", kind: str = "fp32", **lora: Any) -> PeftModel:
    torch.manual_seed(0)
    dtype, upcast = ADAPTERS[kind]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["conv"]} | lora)
    base = LAYERS[layer]() if isinstance(layer, str) else layer
    model = get_peft_model(One(base).to(dtype), config, autocast_adapter_dtype=upcast).train()
    randomise_adapters(model)
    return model


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model.conv


def batch(layer: str = "3x3", dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = (3,)) -> Tensor:
    size = {"1d": (9,), "3d": (2, 5, 4)}.get(layer, SIZE)
    return torch.randn(*batch, D_IN, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


def require(model: PeftModel, names: tuple[str, ...]) -> None:
    layer = layer_of(model)
    if layer.base_layer.bias is not None:
        layer.base_layer.bias.requires_grad_("bias" in names)
    layer.lora_A.requires_grad_("lora_A" in names)
    layer.lora_B.requires_grad_("lora_B" in names)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_output_and_gradients_are_stock_pefts(fast_calls: list[Any], kind: str, names: tuple[str, ...]) -> None:
    model = one(kind=kind)
    require(model, names)
    assert_stocks(model, batch(dtype=ADAPTERS[kind][0]).requires_grad_("x" in names), fast_calls)


@pytest.mark.parametrize("sizes", [(3,), (1,), (0,), ()], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_and_batches(fast_calls: list[Any], layer: str, sizes: tuple[int, ...]) -> None:
    model = one(layer)
    require(model, NAMES)
    x = batch(layer, batch=sizes).requires_grad_()
    if sizes == (0,):  # nothing to compare with the truth
        stock = step(model, x)
        with bind(model):
            torch.testing.assert_close(step(model, x), stock)
        assert len(fast_calls) == 1
    else:
        assert_stocks(model, x, fast_calls)


@pytest.mark.parametrize("bias", [False, True])
def test_the_bias_of_lora_B(fast_calls: list[Any], bias: bool) -> None:
    model = one(nn.Conv2d(D_IN, D_OUT, 3, bias=bias), lora_bias=True)
    assert_stocks(model, batch().requires_grad_(), fast_calls)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(fast_calls: list[Any], kind: str, input_dtype: torch.dtype) -> None:
    model = one(kind=kind)
    require(model, NAMES)
    assert_stocks(model, batch(dtype=input_dtype).requires_grad_(), fast_calls, autocast=True)
    assert {fast_calls[0][number].dtype for number in (0, 3, 4)} == {torch.bfloat16}, "x, lora_A and lora_B"
    with torch.autocast("cpu", torch.bfloat16):
        stock = measure(lambda: model(batch(dtype=input_dtype)), exclude=model).bytes
        with bind(model):
            assert measure(lambda: model(batch(dtype=input_dtype)), exclude=model).bytes < stock


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("names", [NAMES, ("x",)], ids=str)
@pytest.mark.parametrize("layer", ["3x3", "1x1", "strides"])
def test_memory_formats_are_stocks(layer: str, names: tuple[str, ...], p: float) -> None:
    model = one(layer, lora_dropout=p)
    require(model, names)
    found = []
    for bound in (False, True):
        x = batch().to(memory_format=torch.channels_last).requires_grad_()
        if bound:
            bind(model)
        out = model(x)
        out.backward(torch.ones_like(out))
        found.append((out.stride(), x.grad.stride()))
    assert found[0] == found[1]


def test_dropout_drops_what_it_says(fast_calls: list[Any]) -> None:
    """The mean over many masks is the output without dropout."""
    model, x = one(lora_dropout=0.5), batch()
    expected = model.eval()(x)
    with bind(model.train()), torch.no_grad():
        outs = torch.stack([model(x) for _ in range(400)])
        assert torch.equal(model.eval()(x), model(x))
    spread = outs.std(0).max()
    assert spread > 0.01
    assert (outs.mean(0) - expected).abs().max() < 6 * spread / 20


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_retained_bytes(kind: str, p: float) -> None:
    """x once, with dropout 16 bytes; frozen with dropout off, nothing, where stock PEFT's base layer retains x."""
    stock, model = one(kind=kind, lora_dropout=p), one(kind=kind, lora_dropout=p)
    x = batch(dtype=ADAPTERS[kind][0]).requires_grad_()
    with bind(model):
        live, expected = (measure(lambda m=m: m(x), exclude=m).bytes for m in (model, stock))
        assert live == x.nbytes + (16 if p else 0) < expected
        require(model, ())
        require(stock, ())
        layer_of(model).lora_dropout["default"].p = 0.0  # as `freeze` does
        frozen, expected = (measure(lambda m=m: m(x), exclude=m).bytes for m in (model, stock))
        assert frozen == 0 < x.nbytes <= expected


@pytest.mark.parametrize("layer", ["3x3", "groups", "1d", "3d"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_score_is_that_of_the_output_and_the_base_layers_output(layer: str, p: float) -> None:
    model, x = one(layer, lora_dropout=p), batch(layer)
    conv = layer_of(model)
    channels = 1 - conv.base_layer.weight.dim()
    base = conv.base_layer(x).movedim(channels, -1)
    found = AdapterStatistics(blocks=RowBlocks.spread(base.numel() // D_OUT, block_rows=8))
    expected = AdapterStatistics(blocks=found.blocks)
    with bind(model):
        conv.__dict__["_safe_state"].observe["default"] = lambda _: found
        out = conv(x)
    assert out.requires_grad
    first, counts = expected.take(base.detach())
    expected.add_features(first, expected.take(out.detach().movedim(channels, -1))[0], counts)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-4, atol=0)
    assert expected.one_minus_cka() > 1e-4


@pytest.mark.parametrize("layer", ["3x3", "1d"])
def test_compiled_whole(layer: str) -> None:
    assert_compiled(one(layer), batch(layer).requires_grad_(), 4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointed(p: float) -> None:
    model, x = one(lora_dropout=p), batch().requires_grad_()
    with bind(model):
        results: list[list[Any]] = []
        for call in (model, partial(checkpoint, model, use_reentrant=False)):
            torch.manual_seed(5)
            model.zero_grad()
            x.grad = None
            call(x).sin().sum().backward()
            results.append([x.grad, *(q.grad for q in model.parameters() if q.requires_grad)])
    assert all(map(torch.equal, *results))


def test_a_write_to_the_input_is_an_error_as_in_stock() -> None:
    model = one()
    for bound in (False, True):
        x = batch()
        if bound:
            bind(model)
        out = model(x)
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_merged_and_a_disabled_adapter_are_pefts(fast_calls: list[Any]) -> None:
    model = one()
    assert_pefts_if_merged_or_disabled(model, layer_of(model).base_layer, batch(), fast_calls)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 5, 4, 4), torch.ones(5), torch.ones(2, D_IN, 1, 1, dtype=torch.float64)], ids=lambda x: x.shape
)
def test_errors_are_pefts(x: Tensor) -> None:
    model = one(nn.Conv2d(D_IN, D_OUT, 3))
    with pytest.raises(Exception) as stock:
        model(x)
    with bind(model), pytest.raises(type(stock.value)) as ours:
        model(x)
    assert str(ours.value).startswith(str(stock.value))


def hooked() -> PeftModel:
    model = one()
    layer_of(model).base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    return model


def hooked_adapter() -> PeftModel:
    model = one()
    layer_of(model).lora_B["default"].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def trained_base() -> PeftModel:
    model = one()
    layer_of(model).base_layer.weight.requires_grad_(True)
    return model


def subclass() -> PeftModel:
    model = one()
    layer_of(model).base_layer.__class__ = type("Own", (nn.Conv2d,), {})
    return model


def several() -> PeftModel:
    model = one()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["conv"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def widened() -> PeftModel:
    """lora_A with another padding, which a larger lora_B makes up for."""
    model = one(nn.Conv2d(D_IN, D_OUT, 3, padding=1))
    layer = layer_of(model)
    layer.lora_A["default"] = nn.Conv2d(D_IN, 4, 3, padding=2, bias=False)
    layer.lora_B["default"] = nn.Conv2d(4, D_OUT, 3, bias=False)
    return model


def parametrised() -> PeftModel:
    model = one()
    nn.utils.parametrizations.weight_norm(layer_of(model).base_layer)
    return model


def tiled() -> PeftModel:
    """As models of images are made to draw seamless tiles."""
    model = one(nn.Conv2d(D_IN, D_OUT, 3, padding=1))
    for conv in (module for module in model.modules() if type(module) is nn.Conv2d):
        conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x.roll(1, -1), weight, bias, padding="same")
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "hooks on the base layer"),
        (hooked_adapter, "hooks on lora_A, lora_B or lora_dropout"),
        (trained_base, "base weight trains"),
        (subclass, "base layer is a Own"),
        (tiled, "_conv_forward is replaced"),
        (several, "several adapters are active on a convolution"),
        (widened, "lora_A has other steps or padding than the base layer"),
        (parametrised, "base layer is a ParametrizedConv2d"),
        (lambda: one(use_dora=True), "DoRA on a convolution"),
        (lambda: one(nn.Conv2d(D_IN, D_OUT, 3, padding="same")), "base layer pads with zeros, same"),
        (lambda: one(nn.Conv2d(D_IN, D_OUT, 3, padding=1, padding_mode="circular")), "base layer pads with circular"),
    ],
)
def test_what_is_not_covered_runs_pefts_own_path(
    make: Callable[[], PeftModel], reason: str, fast_calls: list[Any]
) -> None:
    model, x = make(), batch().requires_grad_()
    expected = step(model, x)
    with bind(model):
        assert refusal(layer_of(model)).startswith(reason)
        assert [row.reason.startswith(reason) for row in explain(model)] == [True]
        got = step(model, x)
    assert not fast_calls
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_another_dilation_than_lora_As_fails_as_in_peft() -> None:
    """PEFT does not pass the dilation on."""
    model = one(nn.Conv2d(D_IN, D_OUT, (2, 3), dilation=2))
    assert refusal(layer_of(model)) == "lora_A has another dilation than the base layer"
    with pytest.raises(RuntimeError), bind(model):
        model(batch())


def test_casting_switched_off_is_left_to_peft() -> None:
    model, x = one(kind="fp32 over bf16"), batch(dtype=torch.bfloat16)
    assert refusal(layer_of(model), (x,)) is None
    with disable_input_dtype_casting(model):
        assert refusal(layer_of(model), (x,)) == "input and adapter differ in dtype, and casting is switched off"
        with pytest.raises(RuntimeError), bind(model):
            model(x)


def test_a_replaced_method_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(one())
    assert refusal(layer) is None
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: x)
    assert refusal(layer) == "Conv2d.forward is replaced"
