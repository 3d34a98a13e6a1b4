"""Hooks on the calls of all modules see the calls that stock PEFT makes; hooks that only observe change no path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from blocks import loss_and_gradients
from families import family
from owners_of_code import NAMES, owners
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

from safe_peft import bind, explain

REGISTER: dict[str, Callable[..., Any]] = {
    "forward": torch_module.register_module_forward_hook,
    "forward_pre": torch_module.register_module_forward_pre_hook,
    "full_backward": torch_module.register_module_full_backward_hook,
    "full_backward_pre": torch_module.register_module_full_backward_pre_hook,
}


@contextmanager
def counted(kind: str, model: nn.Module) -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    names = {id(module): name for name, module in model.named_modules()}  # not the loss function's

    def hook(module: nn.Module, *_: Any) -> None:
        seen[names.get(id(module), type(module).__name__)] += 1

    handle = REGISTER[kind](hook)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in REGISTER), *((n, "forward") for n in NAMES), ("t5", "full_backward")],
)
def test_hooks_on_all_modules_see_every_call(name: str, kind: str) -> None:
    one = family(name)
    model, batch = one.model(lora_dropout=0.1), one.batch()
    with bind(model):
        with counted(kind, model) as ours:
            loss_and_gradients(model, batch)
        assert {row.path for row in explain(model)} == {"safe_kernels::lora"}
    with counted(kind, model) as stock:
        loss_and_gradients(model, batch)
    assert ours == stock


def test_hooks_on_all_modules_are_named() -> None:
    model = family("llama").model()
    with bind(model), counted("forward", model):
        assert {row.reason for row in explain(model)} == {
            "hooks on the calls of all modules, lora_A and lora_B among them"
        }
        reasons = {part.name: part.reason for part in explain(model).parts}
        assert reasons["model.layers.0.mlp"] == "hooks on the calls of all modules, act_fn among them"
        assert reasons["model.layers.0.input_layernorm"] == "", "which is called itself"


def test_recognition_calls_nothing_of_the_users() -> None:
    model = family("llama").model()
    act, seen = owners(model, "SiLUActivation")[0], []
    act.register_forward_hook(lambda *_: seen.append(1))
    act.register_forward_pre_hook(lambda *_: seen.append(1))
    with bind(model):
        explain(model)
    assert not seen


def test_who_only_counts_does_not_change_the_path(fast_calls: list[Any]) -> None:
    one = family("llama")
    model, batch = one.model(), one.batch()
    with bind(model), FlopCounterMode(display=False):
        model(**batch).loss.backward()
    assert len(fast_calls) == 14
