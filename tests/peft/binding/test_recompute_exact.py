"""A frozen block that runs again gives the gradients of one that does not, whatever goes in or out, to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from recomputed import IDS, MODELS, Stack, adapted, compare, frozen_above_the_first, llama, made, mixtral, same, step
from releases import TRANSFORMERS_4
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from safe_kernels.retention import measure
from safe_peft import explain

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
    if not (name == "gemma2" and TRANSFORMERS_4):  # which makes no cache in training
        assert bool(lengths) == (use_cache is not False)


@pytest.mark.parametrize("name", MODELS)
def test_a_context_that_is_cached_is_read_twice(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        known = model.eval()(input_ids=IDS[:, :4], use_cache=True).past_key_values
    model.train()

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


def test_where_hooks_for_saved_tensors_are_forbidden() -> None:
    model = made("llama")

    def compute() -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("forbidden"):
            return model(input_ids=IDS, labels=IDS).loss

    compare(model, compute)


def test_a_forward_without_values() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding, FakeTensorMode(allow_non_fake_inputs=True):
        binding.recompute = binding.blocks
        assert model(input_ids=IDS, labels=IDS).loss.shape == ()


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


def test_a_parameter_that_peft_changes_for_one_call() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["v_proj"], target_parameters=["q_proj.weight"], init_lora_weights=False)
    model = get_peft_model(llama(), config).train()
    compare(model, lambda: model(input_ids=IDS, labels=IDS).loss)
    with frozen_above_the_first(model) as binding:
        binding.recompute = binding.blocks
        model(input_ids=IDS, labels=IDS)
        assert "not recomputed" not in str(explain(model).blocks)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        *(("object", ""), ("in place", "in place"), ("batch norm", "buffers"), ("own weight", "parameters")),
        *(("subclass", "subclass"), ("data of a buffer", "buffers")),
    ],
)
def test_blocks_of_other_peoples_making(way: str, why: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Stack(way), LoraConfig(target_modules=["lin"], init_lora_weights=False)).train()
    x, results, calls = torch.randn(4, 8), [], []
    with frozen_above_the_first(model) as binding:
        for names in ((), binding.blocks):
            binding.recompute.update(names)
            for block in model.base_model.model.blocks:
                block.calls = 0
                block.mean.zero_()
            results.append(step(model, lambda: model(x)))
            calls.append([(block.calls, block.mean.tolist()) for block in model.base_model.model.blocks])
        state = explain(model).blocks[binding.blocks[1]]
    same(results[1], results[0])
    assert calls[0] == calls[1], "a call in backward leaves no trace in the module"
    assert why in state
    assert ("would not be exact" in state) == bool(why)
