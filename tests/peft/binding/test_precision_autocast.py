"""Autocast of every kind, and bases of half precision: as near the truth as stock PEFT, with its dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from blocks import error, together
from families import Family, family
from peft import PeftModel
from torch import Tensor, nn
from toy import Toy, gradients, pairs, toy

from safe_peft import bind

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Context = AbstractContextManager[Any]


def autocast(dtype: torch.dtype, **options: Any) -> Context:
    return torch.autocast("cpu", dtype, **options)


def run(model: nn.Module, batch: dict[str, Tensor], context: Context) -> tuple[Tensor, dict[str, Tensor]]:
    with context:
        out = model(**batch)
        loss = out if isinstance(out, Tensor) else out.loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_as_near_as_peft(model: PeftModel, batch: dict[str, Tensor], context: Callable[[], Context]) -> None:
    """To the same model in float64; all gradients as one vector, as of a small one either side may be right by luck."""
    truth, true_grads = run(copy.deepcopy(model).double(), batch, nullcontext())
    loss, grads = run(model, batch, context())
    with bind(model):
        own, own_grads = run(model, batch, context())
    rounding = torch.finfo(BF16).eps
    assert error(own, truth) <= 2 * error(loss, truth) + rounding
    exact, stock, ours = (together(found) for found in (true_grads, grads, own_grads))
    assert error(ours, exact) <= 2 * error(stock, exact)
    assert own.dtype == loss.dtype
    assert {name: grad.dtype for name, grad in own_grads.items()} == {name: grad.dtype for name, grad in grads.items()}


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "not-cached"])
@pytest.mark.parametrize("one", [family("llama"), family("bert"), family("gpt2")], ids=str)
def test_autocast(one: Family, dtype: torch.dtype, cache: bool) -> None:
    assert_as_near_as_peft(one.model(), one.batch(), lambda: autocast(dtype, cache_enabled=cache))


@pytest.mark.parametrize("inner", [{"dtype": BF16}, {"dtype": FP16}, {"dtype": BF16, "enabled": False}], ids=str)
@pytest.mark.parametrize("outer", [nullcontext, lambda: autocast(BF16)], ids=["plain", "autocast"])
def test_autocast_around_one_block_alone_or_off_in_it(outer: Callable[[], Context], inner: dict[str, Any]) -> None:
    model = toy(3)
    own: Toy = model.base_model.model

    def around(block: nn.Module, x: Tensor) -> Tensor:
        with autocast(**inner) if block is own.blocks[1] else nullcontext():
            return block(x.float())

    own.around = around
    batch = next(pairs(1))
    loss, grads = run(model, batch, outer())
    with bind(model):
        own_loss, own_grads = run(model, batch, outer())
    assert own_loss.dtype == loss.dtype
    assert error(own_loss, loss) <= 1e-2
    for name, grad in grads.items():
        assert own_grads[name].dtype == grad.dtype
        assert error(own_grads[name], grad) <= 3e-2, name


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("base", "adapters"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16)], ids=str)
@pytest.mark.parametrize("one", [family("llama"), family("bert")], ids=str)
def test_a_base_of_half_precision(one: Family, base: torch.dtype, adapters: torch.dtype, cast: bool) -> None:
    """PEFT keeps adapters in float32 over it unless it is told otherwise."""
    model = one.model(dtype=base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    assert_as_near_as_peft(model, one.batch(), lambda: autocast(base) if cast else nullcontext())
