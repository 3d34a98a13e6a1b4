"""A loss in chunks is the model's own, for whatever trains on it; a model that it is not the loss of is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from causal_losses import LENGTH, ROWS, AddsToItsLoss, batch, made, results, small
from families import VOCABULARY
from peft import LoraConfig, get_peft_model
from torch import nn

import safe_peft
from safe_kernels import retention
from safe_peft import AdapterFreezer, ConfigError, SafeConfig, bind, chunked_loss, plan_memory
from safe_peft.finetune import measure
from safe_peft.loss import own_loss

CAUSAL = ("llama", "gpt2", "gemma")


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_it_is_the_models_own(name: str, padded: bool, bound: bool) -> None:
    model, given = made(name, p=0.1 if name == "gpt2" else 0.0, lora_dropout=0.1), batch(padded)
    if bound:
        bind(model)
    chunked_loss(model, given)  # the first call looks, and draws what it draws from a generator of its own
    expected, found = results(model, own_loss, given), results(model, chunked_loss, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(model.eval(), given), own_loss(model, given), rtol=1e-6, atol=0)


CHANGED: dict[str, Callable[[], nn.Module]] = {
    "cap": lambda: small(hf.Gemma2Config, hf.Gemma2ForCausalLM, final_logit_softcapping=1.0),
    "factor": lambda: small(hf.CohereConfig, hf.CohereForCausalLM, logit_scale=0.25),
    "divisor": lambda: small(hf.GraniteConfig, hf.GraniteForCausalLM, logits_scaling=3.0),
}


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHANGED)
def test_models_that_cap_or_scale_their_logits(name: str, dtype: torch.dtype, head_trains: bool) -> None:
    model, given = CHANGED[name]().to(dtype), batch(padded=True)
    model.get_output_embeddings().requires_grad_(head_trains)
    (value, grads), (expected, exact) = (results(model, loss, given) for loss in (chunked_loss, own_loss))
    half = dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, rtol=1e-2 if half else 1e-5, atol=0)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=float(b.abs().max()) * (5e-2 if half else 1e-5) + 1e-12)


def test_a_head_that_trains_runs_again_in_backward() -> None:
    model, given = small(hf.LlamaConfig, hf.LlamaForCausalLM, tie_word_embeddings=False), batch(padded=True)
    torch.testing.assert_close(results(model, chunked_loss, given), results(model, own_loss, given))
    kept = [
        retention.measure(lambda loss=loss: loss(model, given), exclude=[model, *given.values()]).bytes
        for loss in (own_loss, chunked_loss)
    ]
    assert kept[0] - kept[1] > 0.4 * ROWS * LENGTH * VOCABULARY * 4


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": 0}], ids=str)
def test_a_batch_without_targets(items: dict[str, int]) -> None:
    model, given = made("llama"), {**batch(), **items}
    given["labels"] = torch.full_like(given["labels"], -100)
    expected, found = results(model, own_loss, given), results(model, chunked_loss, given)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[0].isnan() and not any(grad.any() for grad in found[1])


def test_samples_of_one_token_come_first() -> None:
    model = made("llama")
    given = {name: value[:, :1] for name, value in batch().items()}
    expected, found = results(model, own_loss, given), results(model, chunked_loss, given)
    torch.testing.assert_close(found, expected, equal_nan=True)
    with pytest.raises(ConfigError, match="chunked differs"):  # they have shown nothing
        refused = AddsToItsLoss(model.get_base_model().config)
        chunked_loss(refused, given)
        chunked_loss(refused, batch())


def test_a_head_that_trains_is_not_written_to_before_backward() -> None:
    model = small(hf.LlamaConfig, hf.LlamaForCausalLM, tie_word_embeddings=False)
    for loss in (own_loss, chunked_loss):
        value = loss(model, batch())
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_a_label_that_is_no_token_is_refused() -> None:
    model, given = made("llama"), batch()
    chunked_loss(model, given)
    given["labels"] = given["labels"].clone().fill_(VOCABULARY)
    with pytest.raises(IndexError, match=rf"target must be in \[0, {VOCABULARY}\)"):
        chunked_loss(model, given)


def test_a_batch_that_cannot_be_cut_is_looked_at_whole() -> None:
    model, given = made("llama"), batch()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(ROWS, 1, LENGTH, LENGTH)
    torch.testing.assert_close(chunked_loss(model, {**given, "attention_mask": causal}), own_loss(model, given))


def test_in_half_precision_gradients_err_no_more_than_the_models_own() -> None:
    exact = results(made("llama", dtype=torch.float64), own_loss, batch())[1]
    model = made("llama", dtype=torch.bfloat16)

    def error(loss: Callable[..., Any]) -> float:
        pairs = zip(results(model, loss, batch())[1], exact, strict=True)
        return float(sum(((a.double() - b) ** 2).sum() for a, b in pairs)) ** 0.5

    assert error(chunked_loss) <= 1.1 * error(own_loss)
    with torch.no_grad():
        value = chunked_loss(model, batch())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, own_loss(model, batch()), rtol=1e-3, atol=0)


@pytest.mark.parametrize("within", [False, True])
def test_mixed_precision(within: bool) -> None:
    """Around a step, or as accelerate does it, around the model's forward alone."""
    model = made("llama")
    mixed = torch.autocast("cpu", dtype=torch.bfloat16)
    if within:
        inner = model.get_base_model()
        inner.forward = mixed(inner.forward)
    with nullcontext() if within else mixed:
        expected, found = results(model, own_loss, batch()), results(model, chunked_loss, batch())
    torch.testing.assert_close(found[0].float(), expected[0], rtol=1e-2, atol=0)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=2e-2 * float(b.abs().max()))


def test_whole_logits_are_neither_retained_nor_planned() -> None:
    model, given = made("llama"), batch()
    chunked_loss(model, given)

    def kept(loss: Callable[..., Any]) -> int:
        return retention.measure(lambda: loss(model, given), exclude=[model, *given.values()]).bytes

    logits = ROWS * LENGTH * VOCABULARY * 4
    assert kept(own_loss) - kept(chunked_loss) > 0.4 * logits
    without_mask = {name: value for name, value in given.items() if name != "attention_mask"}
    plan = plan_memory(model, batch=without_mask, loss=chunked_loss)
    assert plan.stock.retained == kept(chunked_loss)
    assert plan_memory(model, batch=without_mask, loss=own_loss).stock.peak > plan.stock.peak


def test_products_are_counted() -> None:
    model, given = made("llama"), batch()
    chunked_loss(model, given)
    own, chunked = (measure.step_flops(model, given, loss) for loss in (own_loss, chunked_loss))
    assert chunked == own + ROWS * 2 * VOCABULARY * 32, "the last tokens' logits, by the way"


def test_a_freezer_takes_the_first_look_for_no_batch() -> None:
    scores = []
    for loss in (own_loss, chunked_loss):
        model = made("llama", lora_dropout=0.1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(target_fraction=0.5, score_interval=1), total_steps=8)
        torch.manual_seed(1)
        for _ in range(2):
            loss(model, batch(padded=True)).backward()
            freezer.step()
        scores.append(freezer.ledger.scorings)
    assert scores[0] and [scoring.step for scoring in scores[0]] == [scoring.step for scoring in scores[1]]
    for one, other in zip(*scores, strict=True):
        assert one.importance == pytest.approx(other.importance, rel=1e-5)


def test_nothing_is_left_behind() -> None:
    model, given = made("llama"), batch()
    head = model.get_output_embeddings()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    safe_peft.loss.check.check(model, given)
    assert torch.equal(torch.get_rng_state(), state) and [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'"):
        chunked_loss(model, {**given, "input_ids": given["input_ids"].float()})
    assert not head._forward_pre_hooks
    assert model(**given).logits.shape == (ROWS, LENGTH, VOCABULARY)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: small(hf.LlamaConfig, AddsToItsLoss), "losses are not those"),
        (lambda: made("t5"), "T5ForConditionalGeneration has an encoder"),
        (lambda: made("bert"), "got NoneType in BertForSequenceClassification"),
        (
            lambda: get_peft_model(
                small(hf.LlamaConfig, hf.LlamaForCausalLM), LoraConfig(target_modules=["q_proj", "lm_head"])
            ),
            "a plain torch.nn.Linear, got Linear in LlamaForCausalLM",
        ),
        (lambda: nn.Linear(2, 2), "got NoneType in Linear"),
    ],
)
def test_a_model_with_another_loss_is_refused(model: Callable[[], nn.Module], named: str) -> None:
    for _ in range(2):  # not the first time alone
        with pytest.raises(ConfigError, match=f"loss: chunked .*{named}.*use the model's own loss"):
            chunked_loss(model(), batch())


@pytest.mark.parametrize(
    ("labels", "got"), [(None, "NoneType"), (torch.ones(3, dtype=torch.long), r"of shape \[3\]"), ([[1, 2]], "list")]
)
def test_a_batch_without_labels_is_refused(labels: Any, got: str) -> None:
    with pytest.raises(ConfigError, match=rf"batch: expected labels of shape \[samples, tokens\], got {got}"):
        chunked_loss(made("llama"), {**batch(), "labels": labels})
