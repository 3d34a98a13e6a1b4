"""A model of one linear layer: what a step of it gives with stock code, and with the layer bound."""

from __future__ import annotations

import copy
from typing import Any

import torch
from blocks import error
from peft import PeftModel
from torch import Tensor, nn
from toy import gradients

from safe_peft import bind

D_IN, D_OUT, ROWS = 24, 20, 33
ADAPTERS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "fp32 over bf16": (torch.bfloat16, True)}
"""The layer's dtype, and whether its adapter is float32 all the same."""


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model.linear


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, ROWS // 3, D_IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output and all gradients of one call."""
    leaf = x.detach().requires_grad_(x.requires_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(leaf)
    if out.requires_grad:
        out.backward(torch.sin(torch.arange(out.numel())).reshape(out.shape).to(out.dtype))
    found = {"out": out.detach(), **gradients(model)}
    return found if leaf.grad is None else {**found, "x": leaf.grad}


def assert_stocks(model: PeftModel, x: Tensor, fast_calls: list[Any], autocast: bool = False) -> None:
    truth = step(copy.deepcopy(model).double(), x.detach().double().requires_grad_(x.requires_grad))
    stock = step(model, x, autocast)
    with bind(model):
        ours = step(model, x, autocast)
    assert len(fast_calls) == 1
    assert {name: (v.shape, v.dtype) for name, v in ours.items()} == {n: (v.shape, v.dtype) for n, v in stock.items()}
    rounding = max(torch.finfo(stock["out"].dtype).eps, 2**-21)  # sums over many rows in fp32 have more than one
    for name, value in ours.items():
        assert error(value, truth[name]) <= 2 * error(stock[name], truth[name]) + rounding, name


def assert_compiled(model: PeftModel, x: Tensor, tensors: int) -> None:
    """A bound layer, compiled as a whole, gives the same output and gradients to the bit."""
    torch._dynamo.reset()
    with bind(model):
        eager, compiled = step(model, x), step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert all(torch.equal(eager[name.removeprefix("_orig_mod.")], value) for name, value in compiled.items())
    assert len(eager) == len(compiled) == tensors


def assert_pefts_if_merged_or_disabled(model: PeftModel, base: nn.Module, x: Tensor, fast_calls: list[Any]) -> None:
    expected = model(x)
    with bind(model):
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        model.merge_adapter()
        assert error(model(x), expected) < 1e-5
        model.unmerge_adapter()
        assert not fast_calls
        assert error(model(x), expected) < 1e-5
    assert len(fast_calls) == 1
