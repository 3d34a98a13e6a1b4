"""Which modules are norms: PyTorch's own and their subclasses, and what is said of those that are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from safe_kernels.retention import measure
from safe_peft import bind, explain
from safe_peft.binding.explain import PartPath

D = 16


class FP32LayerNorm(nn.LayerNorm):
    """As diffusers writes it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class WideLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class ChannelsFirstNorm(nn.LayerNorm):
    """As ConvNeXt writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.lin = nn.Linear(D, D), norm, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.norm(self.first(x))).float().square().sum()


def make(norm: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["first", "lin"], init_lora_weights=False)
    return get_peft_model(Net(norm()), config, autocast_adapter_dtype=False).to(dtype).train()


def part_of(model: nn.Module) -> PartPath:
    (part,) = [part for part in explain(model).parts if part.name == "norm"]
    return part


def gradient(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    model.zero_grad()
    model(torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).to(dtype)).backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def assert_same(one: Tensor, other: Tensor) -> None:
    """To the rounding: the sums of the adapters' kernels have another order on some CPUs."""
    assert float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())


NORMS: dict[str, Callable[[], nn.Module]] = {
    "RMSNorm": lambda: nn.RMSNorm(D, eps=1e-6),
    "RMSNorm, eps None": lambda: nn.RMSNorm(D),
    "RMSNorm, not affine": lambda: nn.RMSNorm(D, eps=1e-6, elementwise_affine=False),
    "LayerNorm": lambda: nn.LayerNorm(D),
    "LayerNorm, no bias": lambda: nn.LayerNorm(D, bias=False),
    "LayerNorm, not affine": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "FP32LayerNorm": lambda: FP32LayerNorm(D, 1e-6),
    "FP32LayerNorm, not affine": lambda: FP32LayerNorm(D, 1e-6, elementwise_affine=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_it_is_served(name: str, dtype: torch.dtype) -> None:
    if "FP32" in name and dtype == torch.float64:
        pytest.skip("it computes in float32")
    model, stock = make(NORMS[name], dtype), make(NORMS[name], dtype)
    x = torch.randn(64, D).to(dtype)
    with bind(model):
        part = part_of(model)
        assert part.path in ("safe_kernels::rms_norm", "safe_kernels::layer_norm")
        got, expected = gradient(model, dtype), gradient(stock, dtype)
        share = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 4e-2}[dtype]
        torch.testing.assert_close(got, expected, rtol=0.0, atol=share * expected.abs().max().item())
        assert measure(lambda: model(x), exclude=model).bytes <= measure(lambda: stock(x), exclude=stock).bytes


@pytest.mark.parametrize("name", NORMS)
def test_under_autocast(name: str) -> None:
    model, stock = make(NORMS[name]), make(NORMS[name])
    with bind(model), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, D)
        got, expected = (m.base_model.model.norm(m.base_model.model.first(x)) for m in (model, stock))
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_dtype_than_the_inputs_is_stocks_to_return(dtype: torch.dtype) -> None:
    x = torch.randn(3, D).to(dtype)
    model = make(lambda: WideLayerNorm(D), dtype)
    with bind(model):
        assert model.base_model.model.norm(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("make_norm", "words"),
    [
        (lambda: nn.GroupNorm(4, D), "groups of channels"),
        (lambda: nn.GroupNorm(1, D), "groups of channels"),
        (lambda: nn.BatchNorm1d(D), "over the batch"),
        (lambda: nn.InstanceNorm1d(5), "channels of an image"),
        (lambda: nn.LayerNorm((5, D)), "over 2 dimensions"),
        (lambda: ChannelsFirstNorm(D), "computes neither"),
    ],
)
def test_the_reason_is_true(make_norm: Callable[[], nn.Module], words: str) -> None:
    model = make(make_norm)
    part = part_of(model)
    assert words in part.reason


# ---------------------------------------------------------------- code that changes


def double(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_patched_class_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = make(NORMS[name]), make(NORMS[name])
    with bind(model):
        gradient(model)
        monkeypatch.setattr(getattr(nn, name), "forward", double)
        assert_same(gradient(model), gradient(stock))
        part = part_of(model)
        assert "replaced" in part.reason


def test_a_class_that_was_patched_before_is_not_taken_for_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.LayerNorm, "forward", double)
    model, stock = make(NORMS["LayerNorm"]), make(NORMS["LayerNorm"])
    with bind(model):
        assert_same(gradient(model), gradient(stock))


def test_an_attribute_that_its_code_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Switched(nn.LayerNorm):
        factor = 1.0

        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    model, stock = make(lambda: Switched(D)), make(lambda: Switched(D))
    with bind(model):
        gradient(model)
        for other in (model, stock):
            other.base_model.model.norm.scale = 3.0
        assert_same(gradient(model), gradient(stock))
        for other in (model, stock):
            other.base_model.model.norm.scale = 1.0
            other.base_model.model.norm.eps = 0.5  # this one is read in every call
        torch.testing.assert_close(gradient(model), gradient(stock), rtol=1e-4, atol=1e-4)


def test_hooks_see_and_change_the_output() -> None:
    model, stock = make(NORMS["LayerNorm"]), make(NORMS["LayerNorm"])
    for other in (model, stock):
        other.base_model.model.norm.register_forward_hook(lambda _, args, out: (out.data.mul_(1.5), None)[1])
    with bind(model):
        got, expected = gradient(model), gradient(stock)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=2e-5 * expected.abs().max().item())
        part = part_of(model)
        assert "hook" in part.reason
