"""Training with the frozen prefix's outputs kept: the same losses and gradients as without, with fewer calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_pair import Pair, batch_of, decoder, epochs, first_of, freeze, matters, sentences, with_dropout
from families import FAMILIES, Family
from peft import PeftModel
from releases import TRANSFORMERS_4
from tiny import adamw, bert
from torch import Tensor, nn

from safe_kernels import retention
from safe_peft.binding.blocks import transformer_blocks
from safe_peft.planning.memory import plan_memory
from safe_peft.prefix.cache import CHECK_EVERY
from safe_peft.prefix.store import Store

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
    is_old = causal and TRANSFORMERS_4  # which has no mask for batches without padding
    assert pair.cache.usage.known >= 24 * 3 - (5 if is_old else 3) * 7
    assert pair.skipped[0] > (1.2 if is_old else 1.5) * tokens


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family(family: Family) -> None:
    model = family.model(3)
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


def test_samples_are_known_although_the_cut_moves_in_every_epoch() -> None:
    pair = Pair(bert(5), cut=1)
    batches = list(epochs(4))
    for cut in (1, 2, 3, 4):
        for model in pair.models:
            freeze(model, cut)
        pair.train(batches[4 * (cut - 1) : 4 * cut])
    # A batch shows that samples are independent; then two of each epoch run as a whole and are compared.
    assert pair.cache.usage.known >= 24 * 3 - 7 - 3 * 2 * 7


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
    pair = Pair(bert(3))
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
    pair = Pair(bert(3))
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
    pair = Pair(bert(3))
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
    pair = Pair(bert(3))
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
                hidden = first_of(layer(hidden, attention_mask))
        return Output(last_hidden_state=hidden)

    return forward


# ---------------------------------------------------------------- what changes


def test_blocks_that_train_again_are_not_known() -> None:
    """By an optimizer whose writes PyTorch does not count, as those of kernels that get an address."""
    pair = Pair(bert(3))

    def train(count: int) -> None:
        for batch in epochs(count):
            pair.backward(batch)
            for model in pair.models:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.data.add_(parameter.grad, alpha=-0.5)
                        parameter.grad = None

    train(2)
    for cut in (0, 2):
        for model in pair.models:
            freeze(model, cut)
        train(1)
    known = pair.cache.usage.known
    train(1)
    assert pair.cache.usage.known > known


@pytest.mark.parametrize("what", ["weight", "data", "scaling", "disabled", "module", "dropout"])
def test_a_change_below_the_cut_is_noticed_at_once(what: str) -> None:
    pair = Pair(bert(3))
    pair.train(epochs(2))
    for model in pair.models:
        layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense
        if what == "weight":
            with torch.no_grad():
                layer.base_layer.weight.mul_(1.5)
        elif what == "data":
            layer.base_layer.weight.data = layer.base_layer.weight * 1.5
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
    pair = Pair(bert(3))
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


def test_a_sample_of_nothing_but_padding() -> None:
    """BERT classifies its first token, so the loss depends on hidden states under a mask of zeros."""
    pair = Pair(bert(3))
    batches = list(epochs(3))
    for batch in batches[5:]:
        batch["attention_mask"][0] = 0
    pair.train(batches)
    assert pair.cache.usage.known > 0 and matters(pair) is False


def test_a_model_without_a_mask() -> None:
    pair = Pair(bert(3))
    batches = [{name: value for name, value in batch.items() if name != "attention_mask"} for batch in epochs(1)]
    pair.train(batches * 3)
    assert pair.cache.usage.known == 48


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
    pair = Pair(bert(3))
    pair.train(epochs(3))
    batch = next(epochs(1))
    sizes = []
    for model in pair.models:
        found = retention.measure(lambda model=model: model(**batch).loss, exclude=[model, *batch.values()])
        sizes.append(found.bytes)
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("make", [lambda: bert(4), decoder], ids=["encoder", "decoder"])
def test_the_plan_knows_what_the_cache_keeps(make: Callable[[], PeftModel]) -> None:
    pair = Pair(make(), cut=1)
    plan = plan_memory(pair.cached, 3, 7)
    batch = batch_of([torch.arange(3 + row, 10 + row) for row in range(3)], causal=make is decoder)
    pair.train([batch] * 3)
    assert plan.prefix == 1 and pair.cache.store.bytes == 3 * plan.prefix_sample > 0
    kept = f"{plan.prefix_sample / 1024:,.1f} KiB per sample"
    assert f"prefix_cache keeps {kept}; frozen blocks below the cut: 1" in str(plan)
    freeze(pair.cached, 0)
    assert plan_memory(pair.cached, 3, 7).prefix == 0
