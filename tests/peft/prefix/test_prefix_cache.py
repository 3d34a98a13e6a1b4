"""Training with the frozen prefix's outputs kept: the same losses and gradients as without, with fewer calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import VOCABULARY, adamw, bert, gpt2, randomise_adapters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification

from safe_kernels import retention
from safe_peft import bind
from safe_peft.binding.blocks import transformer_blocks
from safe_peft.prefix.cache import CHECK_EVERY, PrefixCache
from safe_peft.prefix.store import Store

Batch = dict[str, Tensor]
TOLERANCE = 2e-5


def sentences(count: int = 24, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator)
    return [torch.randint(3, VOCABULARY, (int(n),), generator=generator) for n in lengths]


def epochs(count: int, rows: int = 7, **options: Any) -> Iterator[Batch]:
    """Shuffled epochs, padded to the longest sentence of each batch."""
    data, generator = sentences(), torch.Generator().manual_seed(5)
    for _ in range(count):
        order = torch.randperm(len(data), generator=generator).tolist()
        for begin in range(0, len(data), rows):
            yield batch_of([data[index] for index in order[begin : begin + rows]], **options)


def batch_of(rows: list[Tensor], causal: bool = False, left: bool = False, ignored: int = -100) -> Batch:
    side = "left" if left else "right"
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = (ids != 0).long()
    labels = ids.masked_fill(mask == 0, ignored) if causal else (ids == 3).any(1).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def freeze(model: nn.Module, blocks: int) -> None:
    """Train nothing in the lowest blocks."""
    for number, block in enumerate(transformer_blocks(model).values()):
        for name, parameter in block.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(number >= blocks)


def with_dropout(p: float = 0.2) -> PeftModel:
    model = bert(4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


def decoder(**lora: Any) -> PeftModel:
    model = gpt2(**lora)
    model.config.use_cache = False
    return model


class Pair:
    """The same bound model twice: without a cache, and with one. `plain` may also have one that keeps nothing."""

    def __init__(self, model: nn.Module, cut: int = 2, store: Store | None = None, dropout: bool = True) -> None:
        randomise_adapters(model)
        freeze(model, cut)
        self.plain, self.cached = model, deepcopy(model)
        self.bindings = bind(self.plain), bind(self.cached)
        if not dropout:
            PrefixCache(self.plain, Store(0), dropout=False)
        self.cache = PrefixCache(self.cached, Store(1 << 20) if store is None else store, dropout=dropout)
        self.optimizers = adamw(self.plain), adamw(self.cached)

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        return self.plain, self.cached

    def backward(self, batch: Batch, loss: Callable[[Any], Tensor] = lambda output: output.loss) -> None:
        losses = []
        state = torch.get_rng_state()
        for model in self.models:
            torch.set_rng_state(state)
            value = loss(model(**batch))
            value.backward()
            losses.append(value.item())
        assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)

    def compare(self) -> None:
        named = zip(self.plain.named_parameters(), self.cached.named_parameters(), strict=True)
        for (name, one), (_, other) in named:
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None and other.grad is not None:
                largest = max(float(one.grad.abs().max()), 1e-4)
                assert float((one.grad - other.grad).abs().max()) <= TOLERANCE * largest, name

    def train(self, batches: Iterable[Batch], accumulate: int = 1, **options: Any) -> None:
        for number, batch in enumerate(batches, 1):
            self.backward(batch, **options)
            if number % accumulate == 0:
                self.compare()
                for model, optimizer in zip(self.models, self.optimizers, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    model.eval()
                    model.train()

    @property
    def skipped(self) -> list[int]:
        return list(self.cache.usage.skipped.values())

    @property
    def reason(self) -> str:
        return self.cache.usage.reason


def matters(pair: Pair) -> bool | None:
    return pair.cache._states[0].prefix._padding_matters


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("make", [lambda: bert(4), decoder], ids=["encoder", "decoder"])
def test_epochs_in_other_orders_with_other_padding(make: Callable[[], PeftModel], left: bool) -> None:
    causal = make is decoder
    pair = Pair(make(), cut=1)
    pair.train(epochs(4, causal=causal, left=left))
    tokens = sum(map(len, sentences()))
    assert pair.cache.usage.samples == 4 * 24
    # BERT classifies the first token, here padding; GPT-2 predicts the first token from the padding before it.
    assert matters(pair) is left
    if left:
        return
    # The first batch has shown that padding has no effect, and one of the second epoch that samples are independent.
    assert pair.cache.usage.known >= 24 * 3 - 3 * 7
    assert pair.skipped[0] > 1.5 * tokens


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family(family: Family) -> None:
    model = family.model(4)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    pair = Pair(model, cut=2)
    pair.train([family.batch()] * 4)
    if family.name.startswith("t5"):
        assert "returns more than hidden states" in pair.reason
    else:
        assert pair.cache.usage.known > 0 and pair.reason == ""


def test_the_cut_moves_up_and_kept_samples_go_on_from_where_they_were() -> None:
    pair = Pair(bert(4), cut=1)
    pair.train(epochs(2))
    for model in pair.models:
        freeze(model, 3)
    pair.train(epochs(3))
    first, second, third = pair.skipped
    assert first > second == third > 0


def test_the_cut_moves_down() -> None:
    pair = Pair(bert(4), cut=3)
    pair.train(epochs(2))
    for model in pair.models:
        freeze(model, 1)
    pair.optimizers = adamw(pair.plain), adamw(pair.cached)
    pair.train(epochs(2))
    for model in pair.models:
        freeze(model, 3)
    pair.train(epochs(2))


def test_everything_but_the_head_is_frozen() -> None:
    pair = Pair(bert(3), cut=3)
    pair.train(epochs(3))
    assert len(pair.skipped) == 2


def test_gradients_of_several_forwards() -> None:
    pair = Pair(bert(4))
    pair.train(epochs(4), accumulate=3)
    batches = list(epochs(1))
    for model in pair.models:
        sum(model(**batch).loss for batch in batches).backward()
    pair.compare()
    assert pair.cache.usage.known > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = bert(4)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    pair = Pair(model)
    pair.train(epochs(3))
    assert pair.cache.usage.known > 0


def test_autocast() -> None:
    pair = Pair(bert(4))
    grads = []
    for model in pair.models:
        for batch in [*epochs(1, rows=6)] * 2:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert pair.cache.usage.known > 0
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 2e-2


def test_evaluation_and_suspension_run_all_blocks() -> None:
    pair = Pair(bert(4))
    batch = next(epochs(1))
    before = pair.cache.usage.samples
    with torch.no_grad():
        pair.cached(**batch)
    pair.cached.eval()
    pair.cached(**batch)
    pair.cached.train()
    with pair.cache.suspended():
        pair.cached(**batch)
    assert pair.cache.usage.samples == before
    pair.cached(**batch)
    assert pair.cache.usage.samples == before + 7


def test_close_runs_all_blocks_again() -> None:
    pair = Pair(bert(4))
    pair.train(epochs(2))
    pair.cache.close()
    known = pair.cache.usage.known
    pair.train(epochs(1))
    assert pair.cache.usage.known == known
    assert not any("prefix" in name for name in pair.cached.state_dict())


# ---------------------------------------------------------------- random numbers below the cut


def test_dropout_below_the_cut_is_named_and_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(with_dropout())
    pair.train(epochs(2))
    assert pair.cache.usage.known == 0 and len(pair.cache.store) == 0
    assert "random numbers are drawn below the cut (by a Dropout, p=0.2" in pair.reason
    assert caplog.text.count("prefix_dropout=False") == 1


def test_dropout_is_off_below_the_cut_and_on_above_it() -> None:
    pair = Pair(with_dropout(), dropout=False)
    assert pair.cached.base_model.model.bert.embeddings.dropout.training
    pair.train(epochs(3))
    assert pair.cache.usage.known > 0
    assert all(module.training for module in pair.cached.modules())
    batch = next(epochs(1))
    one, other = (pair.cached(**batch).logits for _ in range(2))
    assert not torch.equal(one, other)


def test_an_interrupt_leaves_dropout_on() -> None:
    pair = Pair(with_dropout(), dropout=False)
    layer = list(transformer_blocks(pair.cached).values())[-1]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pair.cached(**next(epochs(1)))
    handle.remove()
    pair.train(epochs(2))
    with pytest.raises(KeyboardInterrupt):
        layer.register_forward_pre_hook(interrupt)
        pair.cached(**next(epochs(1)))
    pair.cache.close()
    assert all(module.training for module in pair.cached.modules())


def test_blocks_that_are_skipped_at_random(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(bert(4), cut=3)
    for model in pair.models:
        encoder = model.base_model.model.bert.encoder
        encoder.forward = _layer_drop(encoder)
    pair.train(epochs(3))
    assert pair.cache.usage.known == 0 and "the blocks do not run one after the other" in caplog.text


def _layer_drop(encoder: nn.Module) -> Callable[..., Any]:
    def forward(hidden: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

        for number, layer in enumerate(encoder.layer):
            if float(torch.rand(())) > 0.3 or number == 0:
                hidden = layer(hidden, attention_mask)
        return Output(last_hidden_state=hidden)

    return forward


# ---------------------------------------------------------------- what changes


@pytest.mark.parametrize("what", ["weight", "scaling", "disabled", "module", "dropout"])
def test_a_change_below_the_cut_is_noticed_at_once(what: str) -> None:
    pair = Pair(bert(4))
    pair.train(epochs(2))
    for model in pair.models:
        layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense
        if what == "weight":
            with torch.no_grad():
                layer.base_layer.weight.mul_(1.5)
        elif what == "scaling":
            layer.scaling["default"] *= 3
        elif what == "disabled":
            layer.enable_adapters(False)
            freeze(model, 2)
        elif what == "module":
            model.base_model.model.bert.encoder.layer[0].output.LayerNorm = nn.LayerNorm(32, eps=0.1)
            model.base_model.model.bert.encoder.layer[0].requires_grad_(False)
        else:
            model.base_model.model.bert.encoder.layer[0].output.dropout.p = 0.5
    pair.train(epochs(2))


def test_a_change_that_autograd_cannot_see_is_noticed_after_some_forwards(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(bert(4))
    pair.train(epochs(2))
    for model in pair.models:
        model.base_model.model.bert.encoder.layer[0].intermediate.dense.base_layer.weight.data.mul_(1.5)
    with pytest.raises(RuntimeError, match="on something that PyTorch does not count"):
        for batch in epochs(1 + CHECK_EVERY // 4):
            pair.cached(**batch)
    pair.train(epochs(2))
    assert "on something that PyTorch does not count" in caplog.text


def test_padding_that_has_an_effect_belongs_to_the_sample() -> None:
    pair = Pair(decoder(), cut=1)
    pair.train(epochs(4, causal=True, ignored=0))  # the loss counts padding too
    assert matters(pair) is True and pair.cache.usage.known < 48


def test_padding_that_comes_to_have_an_effect_is_an_error() -> None:
    pair = Pair(decoder(), cut=1)
    pair.train(epochs(3, causal=True))
    with pytest.raises(RuntimeError, match="the loss depends on padding now"):
        for batch in epochs(1 + CHECK_EVERY // 4, causal=True, ignored=0):
            pair.cached(**batch).loss.backward()


def test_a_model_without_a_mask() -> None:
    pair = Pair(bert(4))
    batches = [{name: value for name, value in batch.items() if name != "attention_mask"} for batch in epochs(1)]
    pair.train(batches * 3)
    assert pair.cache.usage.known == 48


# ---------------------------------------------------------------- what cannot be skipped


def test_hooks_below_the_cut_are_called() -> None:
    pair = Pair(bert(4))
    pair.train(epochs(2))
    calls: list[int] = []
    for model in pair.models:
        layer = model.base_model.model.bert.encoder.layer[1].attention.self.query
        layer.register_forward_hook(lambda *_: calls.append(1))
    pair.train(epochs(2))
    assert len(calls) == 2 * 2 * 4 and "hooks on a Linear below the cut" in pair.reason


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_asked_for_what_blocks_return(name: str) -> None:
    pair = Pair(bert(4))
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
        torch.manual_seed(0)
        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=64,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.collects: bool | int = True

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.bert.bert.embeddings(input_ids)
        kept = []
        for number, layer in enumerate(self.bert.bert.encoder.layer):
            hidden = layer(hidden)
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
    pair = Pair(bert(4))
    for model in pair.models:
        encoder = model.base_model.model.bert.encoder
        encoder.forward = partial(checkpoint, encoder.forward, use_reentrant=False)
    pair.train(epochs(3))


def test_as_many_samples_as_tokens() -> None:
    pair = Pair(bert(4))
    batch = {"input_ids": torch.randint(3, VOCABULARY, (6, 6)), "labels": torch.zeros(6, dtype=torch.long)}
    pair.train([batch] * 3)
    assert "as many samples as tokens" in pair.reason


def test_inputs_of_the_user_that_require_grad() -> None:
    pair = Pair(bert(4))
    batch = next(epochs(1))
    grads = []
    for model in pair.models:
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(*grads)
    pair.compare()


# ---------------------------------------------------------------- the store


def test_a_store_that_is_too_small_keeps_what_fits() -> None:
    pair = Pair(bert(4), store=Store(memory=8 * 1024))
    pair.train(epochs(6))
    assert 0 < len(pair.cache.store) < 24 and pair.cache.usage.known > 0


def test_a_file_takes_what_memory_does_not() -> None:
    pair = Pair(bert(4), store=Store(memory=4 * 1024, file=1 << 20))
    pair.train(epochs(4))
    assert len(pair.cache.store) >= 24 and pair.cache.usage.known >= 24 * 3 - 3 * 7


def test_the_cache_gives_up_if_samples_never_come_again(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(bert(4), store=Store(memory=2 * 1024))
    with caplog.at_level(logging.WARNING):
        for seed in range(12):
            pair.train([batch_of(sentences(seed=seed + 50))])
    assert "hardly any sample comes again" in caplog.text and pair.cache.store.bytes == 0


def test_nothing_is_retained_more_than_without() -> None:
    pair = Pair(bert(4))
    pair.train(epochs(3))
    batch = next(epochs(1))
    sizes = []
    for model in pair.models:
        found = retention.measure(lambda model=model: model(**batch).loss, exclude=[model, *batch.values()])
        sizes.append(found.bytes)
    assert sizes[1] <= sizes[0]
