"""The contract of whole blocks, to the byte: what one more block adds to what a training forward retains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from blocks import adapter_layers, freeze, retained, thaw
from families import FAMILIES, HEADS, LENGTH, ROWS, D, F, Family, family
from oracle import taking_turns
from torch import Tensor

from safe_peft import bind

RNG = 16


@dataclass(frozen=True)
class Block:
    """What one block retains a token, in elements of the model's dtype, and besides.

    Args:
        features: norm outputs, query, key, value and attention output, in units of d.
        mlp: gate and up, or the pre-activation, in units of f.
        norms: how many norms keep a 1/std of four bytes per row.
        attention: bytes per token of the attention's own statistics.
        adapters: LoRA layers, each with 16 bytes of random state when it drops.
        dropouts: the model's own.
    """

    features: float = 6.0
    mlp: int = 2
    norms: int = 2
    attention: int = 4 * HEADS
    adapters: int = 7
    dropouts: int = 0

    def bytes(self, tokens: int, itemsize: int, drops: bool) -> int:
        elements = self.features * D + self.mlp * F
        kept = tokens * (elements * itemsize + 4 * self.norms + self.attention)
        return int(kept) + (RNG * (self.adapters + self.dropouts) if drops else 0)


BERT = Block(mlp=1, adapters=6, dropouts=2)
BLOCKS = {
    "llama": Block(),
    "mistral": Block(),
    "qwen2": Block(),
    "gemma": Block(),
    # Query and key are normed by head: two outputs more, and a 1/std for each head of each.
    "qwen3": Block(features=8.0, norms=2 + 2 * HEADS),
    "smollm": Block(features=5.0),  # one key and value head for two of the query
    # SDPA keeps the value, which is a third of the one tensor that qkv_proj made. (Its dropouts are resid_pdrop, zero
    # here.)
    "phi3": Block(features=8.0, adapters=4),
    "bert": BERT,
    "roberta": BERT,
    "distilbert": Block(mlp=1, adapters=6, dropouts=1),
    "gpt2": Block(mlp=1, adapters=4, dropouts=2),
    "vit": Block(mlp=1, adapters=6, dropouts=2),
    "mpnet": Block(mlp=1, adapters=6, dropouts=2, attention=0),  # its attention is computed again in backward
}


def tokens_of(one: Family, batch: dict[str, Tensor]) -> int:
    return ROWS * (17 if one.name == "vit" else LENGTH)


def added_by_one_block(one: Family, p: float, dtype: torch.dtype, frozen: str = "none", padded: bool = False) -> int:
    sizes = []
    for layers in (2, 3):
        model, batch = one.model(layers, p, p, dtype), one.batch()
        if padded:
            batch["attention_mask"][0, LENGTH // 2 :] = 0
        batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
        freeze(model, frozen)
        with bind(model):
            sizes.append(retained(model, batch))
    return sizes[1] - sizes[0]


@pytest.mark.parametrize(
    ("name", "p", "dtype"), taking_turns(list(BLOCKS), (0.0, 0.1), (torch.float32, torch.bfloat16)), ids=str
)
def test_a_block_that_trains(name: str, p: float, dtype: torch.dtype) -> None:
    one = family(name)
    tokens = tokens_of(one, one.batch())
    assert added_by_one_block(one, p, dtype) == BLOCKS[name].bytes(tokens, dtype.itemsize, p > 0)


def test_mask_and_bias_are_added_once_for_all_blocks() -> None:
    one = family("mpnet")
    plain = added_by_one_block(one, 0.0, torch.float32)
    assert added_by_one_block(one, 0.0, torch.float32, padded=True) == plain


@pytest.mark.parametrize("name", ["t5", "t5-gated"])
def test_t5_keeps_no_mask_and_no_dropped_copy(name: str) -> None:
    """An encoder's and a decoder's block: five norms, three attentions, two MLPs."""
    one = family(name)
    stock = [retained(one.model(layers), one.batch()) for layers in (2, 3)]
    gates = 1 if name == "t5" else 2
    plain, own = (added_by_one_block(one, p, torch.float32) for p in (0.0, 0.1))
    tokens = ROWS * LENGTH
    adapters, dropouts = 3 * 4 + 2 * (1 + gates), 5 + 2
    assert own - plain == RNG * (adapters + dropouts)
    mlps = tokens * 2 * gates * F * 4
    assert plain < stock[1] - stock[0] - tokens * 5 * 4 * D // 2
    assert plain >= mlps


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_frozen_block_that_gradient_passes_through(name: str) -> None:
    """Norm outputs, attention and MLP stay, since their own backward reads them; what only adapters read goes."""
    one = family(name)

    def added(freeze_top: bool) -> int:
        sizes = []
        for layers in (2, 3):
            model, batch = one.model(layers, 0.1, 0.1), one.batch()
            count = len(adapter_layers(model)) // layers
            for layer in adapter_layers(model)[count:] if freeze_top else []:
                layer.requires_grad_(False)
                for dropout in layer.lora_dropout.values():
                    dropout.p = 0.0
            with bind(model):
                sizes.append(retained(model, batch))
        return sizes[1] - sizes[0]

    block = BLOCKS[name]
    # In every family here the attention keeps its own output, and norms and MLP keep what they need.
    # A LayerNorm whose output is not kept by a layer that trains keeps its input instead, and its mean as well.
    means = 0 if name == "llama" else 4 * ROWS * LENGTH * block.norms
    assert added(False) - added(True) == RNG * block.adapters - means


@pytest.mark.parametrize("one", FAMILIES, ids=str)
def test_never_more_than_stock_peft(one: Family) -> None:
    def sizes() -> Iterator[int]:
        for frozen in ("none", "prefix", "alternating"):
            thaw(model)
            freeze(model, frozen)
            yield retained(model, batch)

    for p in (0.0, 0.1):
        model, batch = one.model(2, p, p), one.batch()
        stock = list(sizes())
        with bind(model):
            assert all(ours < theirs for ours, theirs in zip(sizes(), stock, strict=True)), p


def test_a_weight_that_trains_is_named_and_retains_the_input() -> None:
    from peft import LoraConfig, get_peft_model

    from safe_peft import explain

    one = family("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    model, batch = get_peft_model(one.make(2, 0.0), config), one.batch()
    loss = model(**batch).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with bind(model):
        notes = {
            part.name: part.reason for part in explain(model).parts if "input_layernorm.modules_to_save" in part.name
        }
        assert set(notes.values()) == {"retains its input: weight trains"}
        model(**batch).loss.backward()
    assert any("input_layernorm" in name for name in grads)
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


def test_a_zero_weight_is_named_and_retains_the_input() -> None:
    from safe_peft import explain

    one = family("llama")
    model, batch = one.model(2), one.batch()
    norm = model.base_model.model.model.layers[0].post_attention_layernorm
    with bind(model):
        before = retained(model, batch)
        with torch.no_grad():
            norm.weight[3] = 0.0
        reasons = {part.name: part.reason for part in explain(model).parts}
        assert "a weight is zero" in reasons["model.layers.0.post_attention_layernorm"]
        assert reasons["model.layers.1.post_attention_layernorm"] == ""
        loss = model(**batch).loss
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        assert retained(model, batch) == before + ROWS * LENGTH * D * 4, "the output is kept by its readers as well"
