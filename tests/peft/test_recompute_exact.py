"""A frozen block that runs again gives the gradients of one that does not, whatever goes in or out, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from test_blocks_recompute import freeze_block
from tiny import randomise_adapters
from torch import Tensor, nn

from safe_kernels.retention import measure
from safe_peft import Binding, bind, explain

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


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_is_filled_once(name: str, use_cache: bool | None, padded: str) -> None:
    model = made(name)
    mask = torch.ones_like(IDS)
    if padded != "none":
        mask[0, slice(7, None) if padded == "right" else slice(3)] = 0
    options = {} if use_cache is None else {"use_cache": use_cache}
    labels = IDS.masked_fill(mask == 0, -100)
    lengths = []

    def compute() -> Tensor:
        output = model(input_ids=IDS, attention_mask=mask, labels=labels, **options)
        cache = output.get("past_key_values") if hasattr(output, "get") else None
        if cache is not None:
            lengths.append((cache, cache.get_seq_length()))
        return output.loss

    compare(model, compute)
    assert all(cache.get_seq_length() == length == IDS.shape[1] for cache, length in lengths)
    assert bool(lengths) == (use_cache is not False)


@pytest.mark.parametrize("name", MODELS)
def test_a_context_that_is_cached_is_read_twice(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        known = model(input_ids=IDS[:, :4], use_cache=True).past_key_values

    def compute() -> Tensor:
        cache = copy.deepcopy(known)
        output = model(input_ids=IDS[:, 4:], past_key_values=cache, labels=IDS[:, 4:])
        assert cache.get_seq_length() == IDS.shape[1]
        return output.loss

    compare(model, compute)


def test_of_a_cache_only_what_the_block_reads_is_kept() -> None:
    sizes = []
    for use_cache in (False, True):
        model = made("llama")
        with frozen_above_the_first(model) as binding:
            binding.recompute.update(binding.blocks)
            loss = lambda: model(input_ids=IDS, labels=IDS, use_cache=use_cache).loss  # noqa: B023, E731
            sizes.append(measure(loss, exclude=[model, IDS]).bytes)
    assert sizes[1] <= sizes[0]


def test_a_static_cache_is_written_in_place_so_the_block_keeps_what_it_saved() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding:
        results = []
        for names in ((), binding.blocks):
            binding.recompute.clear()
            binding.recompute.update(names)
            cache = hf.StaticCache(config=model.config, max_cache_len=16)
            with torch.no_grad():
                model(input_ids=IDS[:, :4], past_key_values=cache)
            loss = model(input_ids=IDS[:, 4:], past_key_values=cache, labels=IDS[:, 4:]).loss
            results.append(step(model, lambda: loss))  # noqa: B023
        same(results[1], results[0])
        assert "static cache" in explain(model).blocks[binding.blocks[1]]


# ---------------------------------------------------------------- in and out by other ways


def test_router_logits_that_are_recorded_have_their_gradient() -> None:
    torch.manual_seed(0)
    model = adapted(mixtral(output_router_logits=True, router_aux_loss_coef=5.0))
    compare(model, lambda: model(input_ids=IDS, labels=IDS).loss)


@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_states_that_are_recorded_have_their_gradient(what: str) -> None:
    torch.manual_seed(0)
    model = adapted(llama(attn_implementation="eager"))

    def compute() -> Tensor:
        output = model(input_ids=IDS, labels=IDS, **{f"output_{what}": True})
        return output.loss + sum(state.square().mean() for state in output[what])

    compare(model, compute)


def test_a_vector_that_a_hook_adds_trains() -> None:
    model = made("llama")
    vector = nn.Parameter(torch.full((32,), 0.01))
    layers = model.base_model.model.model.layers
    layers[1].mlp.register_forward_hook(lambda module, args, out: out + vector)
    model.steering = vector
    compare(model, lambda: model(input_ids=IDS, labels=IDS).loss)


def test_what_a_hook_hangs_on_an_argument_happens_once() -> None:
    model = made("llama")
    layers = model.base_model.model.model.layers

    def double(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and args[0].requires_grad:
            args[0].register_hook(lambda grad: grad * 2)

    layers[2].input_layernorm.register_forward_pre_hook(double)
    compare(model, lambda: model(input_ids=IDS, labels=IDS).loss)


class Carrier:
    """An object that holds tensors, which PyTorch's pytrees do not look into."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.seen = value, list[int]()


class Odd(nn.Module):
    """A block that takes and gives objects, and may write into what it is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.lin, self.norm = way, nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.calls = 0

    def forward(self, hidden: Carrier | Tensor) -> Carrier | Tensor:
        self.calls += 1
        x = hidden.value if isinstance(hidden, Carrier) else hidden
        if self.way == "batch norm":
            x = self.norm(x)
        if self.way == "in place":
            x.mul_(0.5)
        y = torch.sin(self.lin(x)) * self.calls
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
        for block in self.blocks:
            hidden = block(hidden)
        return (hidden.value if isinstance(hidden, Carrier) else hidden).square().sum()


@pytest.mark.parametrize(("way", "why"), [("object", ""), ("in place", "in place"), ("batch norm", "buffers")])
def test_blocks_of_other_peoples_making(way: str, why: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Stack(way), LoraConfig(target_modules=["lin"], init_lora_weights=False)).train()
    x, results, calls = torch.randn(4, 8), [], []
    with frozen_above_the_first(model) as binding:
        for names in ((), binding.blocks):
            binding.recompute.update(names)
            for block in model.base_model.model.blocks:
                block.calls = 0
            results.append(step(model, lambda: model(x)))
            calls.append([block.calls for block in model.base_model.model.blocks])
        state = explain(model).blocks[binding.blocks[1]]
    same(results[1], results[0])
    assert calls[0] == calls[1], "a call in backward leaves no trace in the module"
    assert why in state
    assert ("cannot be exact" in state) == bool(why)
