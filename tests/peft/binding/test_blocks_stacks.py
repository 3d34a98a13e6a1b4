"""Stacks of blocks are found in an nn.Sequential, where timm keeps them, as in an nn.ModuleList."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import randomise_adapters
from torch import Tensor, nn
from toy import Block

from safe_kernels.retention import measure
from safe_peft import bind
from safe_peft.binding.blocks import transformer_blocks


class Loop(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


def model_of(stack: nn.Module, *targets: str) -> PeftModel:
    torch.manual_seed(0)
    wrapped = nn.Sequential(OrderedDict(stem=nn.Linear(8, 8), stack=stack, norm=nn.LayerNorm(8)))
    model = get_peft_model(wrapped, LoraConfig(r=2, target_modules=list(targets))).train()
    randomise_adapters(model)
    return model


@pytest.mark.parametrize("frozen", [0, 2])
def test_a_sequence_of_blocks_is_served_as_a_list_of_them_is(frozen: int) -> None:
    x, sizes, grads = torch.randn(16, 8), [], []
    for kind in (nn.Sequential, Loop):
        torch.manual_seed(1)
        blocks = [Block() for _ in range(3)]
        model = model_of(kind(*blocks) if kind is nn.Sequential else kind(blocks), "up", "down")
        for block in blocks[:frozen]:
            block.requires_grad_(False)
        stock = measure(lambda: model(x).sum(), exclude=[model, x]).bytes  # noqa: B023
        with bind(model) as binding:
            assert binding.blocks == ("stack.0", "stack.1", "stack.2")
            sizes.append(measure(lambda: model(x).sum(), exclude=[model, x]).bytes)  # noqa: B023
            model(x).sum().backward()
        assert sizes[-1] < stock
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert sizes[0] == sizes[1]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_blocks_of_a_sequence_run_again_and_are_named_by_their_keys() -> None:
    torch.manual_seed(1)
    stack = nn.Sequential(OrderedDict(first=Block(), second=Block()))
    model, x, runs = model_of(stack, "up", "down"), torch.randn(16, 8), []
    stack.second.requires_grad_(False)
    stack.second.act.register_forward_hook(lambda *_: runs.append(1))
    with bind(model) as binding:
        assert binding.blocks == ("stack.first", "stack.second")
        binding.recompute.update(binding.blocks)
        model(x).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("sequence", "adapted"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ["0", "1"]),
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), ["0", "2"]),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)), ["stack.0.0"]),
        (nn.Sequential(nn.Sequential(nn.Linear(8, 8))), ["stack.0.0"]),
    ],
    ids=["layers", "network", "mixed", "one"],
)
def test_a_small_network_is_no_stack(sequence: nn.Sequential, adapted: list[str]) -> None:
    assert not transformer_blocks(model_of(sequence, *adapted))
