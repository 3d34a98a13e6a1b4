"""Where blocks below the cut cannot be skipped: all run, and a reason is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cached_pair import Pair, epochs, first_of, freeze, with_dropout
from peft import LoraConfig, get_peft_model
from tiny import VOCABULARY, bert, gpt2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safe_peft import bind
from safe_peft.prefix.cache import PrefixCache
from safe_peft.prefix.store import Store

# ---------------------------------------------------------------- what cannot be skipped


def test_hooks_below_the_cut_are_called() -> None:
    pair = Pair(bert(3))
    pair.train(epochs(2))
    calls: list[int] = []
    for model in pair.models:
        layer = model.base_model.model.bert.encoder.layer[1].attention.self.query
        layer.register_forward_hook(lambda *_: calls.append(1))
    pair.train(epochs(2))
    assert len(calls) == 2 * 2 * 4 and "hooks on a Linear below the cut" in pair.reason


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_asked_for_what_blocks_return(name: str) -> None:
    pair = Pair(bert(3))
    pair.train(epochs(2))
    batch = next(epochs(1))
    one, other = (model(**batch, **{name: True}) for model in pair.models)
    for mine, theirs in zip(*(list(output.values())[-1] for output in (one, other)), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert pair.reason == f"{name} is on"


def test_a_kv_cache() -> None:
    model = gpt2()
    pair = Pair(model, cut=1)
    pair.train(epochs(2, causal=True))
    assert "set use_cache=False" in pair.reason
    output = pair.cached(**next(epochs(1, causal=True)))
    assert output.past_key_values.get_seq_length() == output.logits.shape[1]


class Collecting(nn.Module):
    """A model that keeps what its blocks return: all, one or none."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert(4).unload()
        self.collects: bool | int = True

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.bert.bert.embeddings(input_ids)
        kept = []
        for number, layer in enumerate(self.bert.bert.encoder.layer):
            hidden = first_of(layer(hidden))
            if self.collects is True or (self.collects is not False and self.collects == number):
                kept.append(hidden)
        return torch.stack([hidden, *kept]).mean(0)


def test_a_model_that_keeps_what_its_blocks_return() -> None:
    model = get_peft_model(Collecting(), LoraConfig(target_modules=["query", "intermediate.dense"]))
    pair = Pair(model)
    batch = {"input_ids": torch.randint(3, VOCABULARY, (5, 9))}
    pair.train([batch] * 3, loss=lambda output: output.square().mean())
    assert pair.reason == "the model keeps what its blocks return" and pair.cache.usage.known == 0


def test_a_model_that_comes_to_keep_what_its_blocks_return() -> None:
    model = get_peft_model(Collecting(), LoraConfig(target_modules=["query", "intermediate.dense"]))
    model.base_model.model.collects = False
    pair = Pair(model)
    batch = {"input_ids": torch.randint(3, VOCABULARY, (5, 9))}
    pair.train([batch] * 3, loss=lambda output: output.square().mean())
    assert pair.reason == "" and pair.cache.usage.known == 10
    pair.cached.base_model.model.collects = True
    with pytest.raises(RuntimeError, match="the model keeps what its blocks return"):
        pair.cached(**batch)


def test_a_model_that_keeps_what_the_last_block_below_the_cut_returns() -> None:
    model = get_peft_model(Collecting(), LoraConfig(target_modules=["query", "intermediate.dense"]))
    model.base_model.model.collects = 1
    pair = Pair(model)
    pair.train([{"input_ids": torch.randint(3, VOCABULARY, (5, 9))}] * 3, loss=lambda output: output.square().mean())
    assert pair.reason == "" and pair.cache.usage.known == 10


def test_a_checkpoint_around_the_model() -> None:
    pair = Pair(bert(3))
    for model in pair.models:
        encoder = model.base_model.model.bert.encoder
        encoder.forward = partial(checkpoint, encoder.forward, use_reentrant=False)
    pair.train(epochs(3))


def test_as_many_samples_as_tokens() -> None:
    pair = Pair(bert(3))
    batch = {"input_ids": torch.randint(3, VOCABULARY, (6, 6)), "labels": torch.zeros(6, dtype=torch.long)}
    pair.train([batch] * 3)
    assert "as many samples as tokens" in pair.reason


def test_inputs_of_the_user_that_require_grad() -> None:
    pair = Pair(bert(3))
    batch = next(epochs(1))
    grads = []
    for model in pair.models:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(*grads)
    pair.compare()


# ---------------------------------------------------------------- samples that are not independent


class Blocks(nn.Module):
    """A stack with a part of its own in each block."""

    def __init__(self, part: Callable[[], nn.Module], **reads: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(Layer(part()) for _ in range(4))
        self.reads = reads

    def forward(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        x, pooled = self.embed(ids), []
        for number, layer in enumerate(self.layers):
            x = layer(x, given if number else None)
            if self.reads.get("pools"):
                pooled.append(x.mean(1))
            if self.reads.get("writes"):
                x += 0.3
        return sum(pooled) if pooled else x[:, 0]


class Layer(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.part = nn.Linear(16, 32), nn.Linear(32, 16), part

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        mixed = self.part(x)
        return x + self.down(torch.tanh(self.up(mixed if given is None else mixed * given)))


class OverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class OverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


def blocks(part: Callable[[], nn.Module] = OverTokens, **reads: Any) -> nn.Module:
    return get_peft_model(Blocks(part, **reads), LoraConfig(target_modules=["up", "down"]))


def orders(count: int, **given: Any) -> list[dict[str, Tensor]]:
    """The same rows in other batches."""
    rows = torch.randint(3, VOCABULARY, (12, 7), generator=torch.Generator().manual_seed(1))
    made = []
    for number in range(count):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(number)).tolist()
        made += [{"ids": rows[order[begin : begin + 4]], **given} for begin in (0, 4, 8)]
    return made


def square(output: Tensor) -> Tensor:
    return output.square().mean()


def test_samples_that_depend_on_their_batch() -> None:
    pair = Pair(blocks(OverBatch))
    pair.train(orders(4), loss=square)
    assert pair.cache.usage.known == 0 and "depends on the other samples" in pair.reason
    pair = Pair(blocks())
    pair.train(orders(4), loss=square)
    assert pair.cache.usage.known > 0 and pair.reason == ""


def test_batches_that_come_again_do_not_show_that_samples_are_independent() -> None:
    pair = Pair(blocks(OverBatch), cut=1)
    pair.train(orders(1), loss=square)
    for model in pair.models:
        freeze(model, 2)
    pair.train(orders(4), loss=square)
    assert pair.cache.usage.known == 0 and "depends on the other samples" in pair.reason


def test_a_batch_of_which_only_a_part_was_kept_runs_as_a_whole() -> None:
    pair = Pair(blocks(OverBatch), cut=1, store=Store(1500))
    pair.train(orders(1) * 2, loss=square)
    assert len(pair.cache.store) == 3 and pair.cache.usage.known == 0


def test_a_higher_block_in_which_samples_depend_on_their_batch() -> None:
    parts = iter([OverTokens, OverBatch, OverTokens, OverTokens])
    pair = Pair(blocks(lambda: next(parts)()), cut=1)
    pair.train(orders(2), loss=square)
    assert pair.cache.usage.known > 0
    for model in pair.models:
        freeze(model, 2)
    known = pair.cache.usage.known
    pair.train(orders(4), loss=square)
    assert "depends on the other samples" in pair.reason and pair.cache.usage.known <= known + 12


class PerHead(Layer):
    """A factor per head, of which there are as many as samples in a batch."""

    def forward(self, x: Tensor, factors: Tensor) -> Tensor:
        heads = x.unflatten(2, (4, 4)).transpose(1, 2) * factors
        return x + self.down(torch.tanh(self.up(heads.transpose(1, 2).flatten(2))))


class WithFactors(Blocks):
    def __init__(self) -> None:
        super().__init__(OverTokens)
        self.layers = nn.ModuleList(PerHead(OverTokens()) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x, factors = self.embed(ids), torch.arange(1.0, 5.0).view(4, 1, 1)
        for layer in self.layers:
            x = layer(x, factors)
        return x[:, 0]


def test_an_argument_that_has_a_value_per_head_and_as_many_heads_as_samples() -> None:
    pair = Pair(get_peft_model(WithFactors(), LoraConfig(target_modules=["up", "down"])))
    rows = torch.randint(3, VOCABULARY, (7, 7), generator=torch.Generator().manual_seed(1))
    for order in ([0, 1, 2, 3], [0, 4, 5, 6], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 6]):
        pair.train([{"ids": rows[order]}], loss=square)
    assert pair.cache.usage.known == 4 and "depends on the other samples" in pair.reason


def test_another_argument_in_a_higher_block() -> None:
    pair = Pair(blocks())
    pair.train(orders(3, given=torch.full((1, 1, 16), 1.5)), loss=square)
    assert pair.cache.usage.known == 0 and "other tensors than the first block" in pair.reason


def test_a_write_between_blocks() -> None:
    pair = Pair(blocks(writes=True))
    pair.train(orders(3), loss=square)
    assert pair.cache.usage.known == 0 and "run one after the other" in pair.reason


def test_a_model_that_reads_what_was_skipped_gets_nan() -> None:
    pair = Pair(blocks(pools=True))
    losses = [float(square(pair.cached(**batch))) for batch in orders(4)]
    assert pair.cache.usage.known > 0 and any(map(math.isnan, losses))


@pytest.mark.parametrize("dropout", [True, False])
def test_a_checkpoint_around_the_encoder_with_dropout(dropout: bool) -> None:
    """In backward the blocks run again, and their dropout must be as in forward."""
    grads = []
    for wraps in (False, True):
        model = with_dropout()
        freeze(model, 2)
        bind(model)
        PrefixCache(model, Store(1 << 20), dropout=dropout)
        encoder = model.base_model.model.bert.encoder
        if wraps:
            encoder.forward = partial(checkpoint, encoder.forward, use_reentrant=False)
        torch.manual_seed(0)
        model(**next(epochs(1))).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads)


def test_dropout_is_off_without_gradients_too() -> None:
    """As in GradCache: a forward without gradients, then the same with them."""
    model = with_dropout()
    freeze(model, 2)
    bind(model)
    PrefixCache(model, Store(1 << 20), dropout=False)
    batch, state = next(epochs(1)), torch.get_rng_state()
    with torch.no_grad():
        first = model(**batch).logits
    torch.set_rng_state(state)
    torch.testing.assert_close(model(**batch).logits, first)


def test_losses_that_alternate_between_padding_and_not() -> None:
    pair = Pair(bert(3))
    with pytest.raises(RuntimeError, match="the loss depends on padding now"):
        for number, batch in enumerate(epochs(6)):
            output = pair.cached.base_model.model.bert(batch["input_ids"], batch["attention_mask"])[0]
            (output.square().mean() if number % 2 else output[:, 0].square().mean()).backward()


def test_a_replaced_weight() -> None:
    pair = Pair(bert(3))
    for number in range(4):
        for model in pair.models:
            layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense.base_layer
            layer.weight = nn.Parameter(layer.weight.detach() * (1 + number / 10), requires_grad=False)
        pair.train(epochs(1))
