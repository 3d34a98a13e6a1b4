"""Parts are recognised by what they compute: whatever computes something else stays as it is, and is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, Family, family
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from safe_peft import ConfigError, bind, explain
from safe_peft.binding.blocks import parts_of
from safe_peft.binding.blocks.mlps import Mlp, activation_kind
from safe_peft.binding.blocks.norms import Norm
from safe_peft.binding.class_swap import SwappedModule


class Rms(nn.Module):
    """Of nobody's family, under a name that says nothing."""

    def __init__(self, size: int = 8, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


class SumOfSquares(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().sum(-1, keepdim=True) + self.epsilon).rsqrt()


class WithoutEps(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Centred(Rms):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * nn.functional.layer_norm(x, x.shape[-1:], eps=self.epsilon)


def test_norms() -> None:
    recognised = Norm.recognise(Rms())
    assert recognised is not None and (recognised.formula, recognised.eps, recognised.offset) == (
        "rms_norm",
        "epsilon",
        0,
    )
    centred = Norm.recognise(Centred())
    assert centred is not None and centred.formula == "layer_norm"
    assert Norm.recognise(nn.LayerNorm(8)) is not None
    for other in (SumOfSquares(), WithoutEps(), nn.LayerNorm((2, 8)), nn.GroupNorm(2, 8), nn.Linear(2, 2), nn.ReLU()):
        assert Norm.recognise(other) is None, type(other).__name__


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_python", "gelu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("quick_gelu", None),
        ("gelu_10", None),
        ("mish", None),
        ("relu2", None),
        ("tanh", None),
        ("linear", None),
        ("leaky_relu", None),
        ("sigmoid", None),
    ],
)
def test_activations(name: str, kind: str | None) -> None:
    assert activation_kind(ACT2FN[name]) == kind


class Gated(nn.Module):
    """Roles under names that say nothing, in an order that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(12, 8)
        self.b = nn.Linear(8, 12)
        self.a = nn.Linear(8, 12)
        self.f = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.f(self.b(x)))


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) * self.f(self.b(x)).clamp(max=0.5))


class Chained(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.f(self.a(x)) + self.b(x))


def test_mlps() -> None:
    mlp = Mlp.recognise(Gated())
    assert mlp is not None and (mlp.gate, mlp.up, mlp.down, mlp.kind) == ("b", "a", "c", "silu")
    assert Mlp.recognise(Clamped()) is None
    assert Mlp.recognise(Chained()) is None


def in_blocks(block: nn.Module, targets: Any) -> nn.Module:
    """Two such blocks with LoRA."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(block), nn.Sequential(nn.LayerNorm(8))])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    return get_peft_model(Model(), LoraConfig(r=2, target_modules=targets)).train()


@pytest.mark.parametrize("block", [Gated(), Clamped(), Chained()], ids=lambda block: type(block).__name__)
def test_a_bound_mlp_of_unknown_names_computes_the_same(block: nn.Module) -> None:
    model, x = in_blocks(block, ["a", "b", "c"]), torch.randn(4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    out = model(x)
    out.sigmoid().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with bind(model):
        own = model(x)
        own.sigmoid().sum().backward()
    torch.testing.assert_close(own, out)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_what_looks_like_a_part_and_is_none_is_named() -> None:
    model = in_blocks(nn.Sequential(SumOfSquares(), nn.Linear(8, 8), nn.Mish()), r".*layers\.0\.0\.1")
    model.base_model.model.layers[0][0][0].__class__.__name__ = "StrangeNorm"
    reasons = {part.kind: (part.path, part.reason) for part in explain(model).parts}
    assert reasons["StrangeNorm"] == ("unchanged", "computes neither rms_norm nor layer_norm over the last dimension")
    assert reasons["Mish"] == ("unchanged", "computes none of silu, gelu, gelu_tanh, relu")
    assert "bind(model) puts it on safe_kernels::layer_norm" in reasons["LayerNorm"][1]


def test_hooks_are_not_passed_over() -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    calls: list[int] = []
    with bind(model):
        activation = model.base_model.model.model.layers[0].mlp.act_fn
        handle = activation.register_forward_hook(lambda *_: calls.append(1))
        model(**batch).loss.backward()
        assert calls == [1]
        reasons = {part.name: part.reason for part in explain(model).parts}
        assert reasons["model.layers.0.mlp"] == "hooks on act_fn"
        handle.remove()
        model(**batch).loss.backward()
        assert calls == [1]


def test_a_replaced_forward_is_left_alone() -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    norm = model.base_model.model.model.layers[0].input_layernorm
    norm.forward = lambda x: x * 0.0
    with bind(model):
        assert not isinstance(norm, SwappedModule)
        assert explain(model).parts
        model(**batch).loss.backward()


def test_dropout_in_place_and_other_dropouts_are_left_alone() -> None:
    model = in_blocks(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True), nn.Dropout1d(0.5)), r".*layers\.0\.0\.0"
    )
    with bind(model):
        assert {part.kind: part.path for part in explain(model).parts if "Dropout" in part.kind} == {
            "Dropout": "unchanged"
        }
        model(torch.randn(2, 4, 8)).sum().backward()


def test_only_the_parts_that_are_asked_for() -> None:
    model = family("t5-gated").model(p=0.1)
    for parts in ((), ("norms",), ("mlps", "dropouts")):
        with bind(model, parts=parts):
            bound = {part.stem for _, module, part in parts_of(model) if isinstance(module, SwappedModule)}
            assert bound == set(parts)
    with pytest.raises(
        ConfigError, match=r"parts: expected a list of some of norms, mlps, attention, dropouts, got \('norm',\)"
    ):
        bind(model, parts=("norm",))


@pytest.mark.parametrize("one", FAMILIES, ids=str)
def test_every_part_of_every_family_is_bound_and_given_back(one: Family) -> None:
    model = one.model(p=0.1)
    classes = [type(module) for module in model.modules()]
    state = {name: set(module.__dict__) for name, module in model.named_modules()}
    text = str(model)
    with bind(model):
        paths = {part.path for part in explain(model).parts}
        # Pooler and classifier hold a tanh, which is outside the blocks and of no use to bind.
        assert "unchanged" not in paths, [part for part in explain(model).parts if part.path == "unchanged"]
        assert str(model) == text
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == state


def test_another_dtype_than_the_weights_runs_the_modules_own_code() -> None:
    norm = family("llama").model().base_model.model.model.norm
    x = torch.randn(2, 3, 32).bfloat16()
    model = nn.ModuleDict({"norm": norm})
    part = Norm.recognise(norm)
    assert part is not None
    assert not part.takes(norm, x)
    assert part.takes(norm, x.float())
    assert model
