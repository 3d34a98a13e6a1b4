"""Models whose frozen blocks run again, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from blocks import freeze_block
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import randomise_adapters
from torch import Tensor, nn

from safe_peft import Binding, bind

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


EXPERTS: dict[str, Any] = {**SIZES, "num_local_experts": 4, "num_key_value_heads": 2}


IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(0))


def llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=1, **more))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16))


def mixtral(**more: Any) -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS, **more))


def gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=16, sliding_window=4))


def opt() -> nn.Module:
    sizes = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    return hf.OPTForCausalLM(hf.OPTConfig(**{k: v for k, v in sizes.items() if k != "intermediate_size"}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen3": qwen3,
    "mixtral": mixtral,
    "gemma2": gemma2,
    "opt": opt,
}


def adapted(base: nn.Module, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(targets))).train()
    randomise_adapters(model)
    return model


def made(name: str) -> PeftModel:
    torch.manual_seed(0)
    return adapted(MODELS[name]())


def step(model: nn.Module, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    compute().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextmanager
def frozen_above_the_first(model: nn.Module) -> Iterator[Binding]:
    with bind(model) as binding:
        for name in binding.blocks[1:]:
            freeze_block(model, name)
        yield binding


def compare(model: nn.Module, compute: Callable[[], Tensor]) -> None:
    """Once without running blocks again and once with it; and stock PEFT's gradients to rounding."""
    with frozen_above_the_first(model) as binding:
        expected = step(model, compute)
        binding.recompute.update(binding.blocks)
        same(step(model, compute), expected)
    stock = step(model, compute)
    assert stock.keys() == expected.keys()
    for name, grad in stock.items():
        assert (expected[name] - grad).abs().max() <= 2e-5 * grad.abs().max()


class Carrier:
    """An object that holds tensors, which PyTorch's pytrees do not look into."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.seen = value, list[int]()


class Labelled(Tensor):
    """A tensor that is more than a plain one."""


class Odd(nn.Module):
    """A block that takes and gives objects, and may write into what it is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.lin, self.norm = way, nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("mean", torch.zeros(8))
        self.calls = 0

    def forward(self, hidden: Carrier | Tensor) -> Carrier | Tensor:
        self.calls += 1
        x = hidden.value if isinstance(hidden, Carrier) else hidden
        if self.way == "batch norm":
            x = self.norm(x)
        if self.way == "own weight":
            with torch.no_grad():
                self.norm.weight.clamp_(max=0.5)
            x = x * self.norm.weight
        if self.way == "data of a buffer":
            self.mean.data.lerp_(x.detach().mean(0), 0.5)
            x = x * self.mean
        if self.way == "in place":
            x.mul_(0.5)
        y = torch.sin(self.lin(x)) * self.calls * (2 if type(x) is Labelled else 1)
        if isinstance(hidden, Carrier):
            hidden.seen.append(len(hidden.seen))
            new = Carrier(y * (1 + len(hidden.seen)))
            return new
        return y + hidden.detach()


class Stack(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(Odd(way) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = Carrier(x) if self.way == "object" else x * 1
        hidden = hidden.as_subclass(Labelled) if self.way == "subclass" else hidden
        for block in self.blocks:
            hidden = block(hidden)
        return (hidden.value if isinstance(hidden, Carrier) else hidden).square().sum()
