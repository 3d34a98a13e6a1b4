"""A loss in chunks looks at the arguments of every call, and at what has changed of the model since the last."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from causal_losses import LENGTH, ROWS, AddsToItsLoss, batch, made, results, small
from families import VOCABULARY
from torch import Tensor, nn

import safe_peft
from safe_peft import ConfigError, chunked_loss
from safe_peft.loss import own_loss


def small_gemma2() -> nn.Module:
    return small(hf.Gemma2Config, hf.Gemma2ForCausalLM, final_logit_softcapping=None)


def small_mixtral() -> nn.Module:
    return small(hf.MixtralConfig, hf.MixtralForCausalLM, num_local_experts=2, num_experts_per_tok=1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: made("llama"),
    "gpt2": lambda: made("gpt2"),
    "gemma": lambda: made("gemma"),
    "gemma2": small_gemma2,
    "mixtral": small_mixtral,
    "qwen2": lambda: small(hf.Qwen2Config, hf.Qwen2ForCausalLM),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("items", [100, 7.5, torch.tensor(100), torch.tensor([31])], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_number_of_items_divides_the_sum(name: str, items: Any, first: bool) -> None:
    model, given = MODELS[name](), batch(padded=True)
    for each in (given, {**given, "num_items_in_batch": items})[int(first) :]:
        expected, found = results(model, own_loss, each), results(model, chunked_loss, each)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked_loss(model, each), own_loss(model, each), rtol=1e-6, atol=0)


def test_items_of_a_batch_without_targets() -> None:
    model, given = made("llama"), batch()
    given = {**given, "labels": torch.full_like(given["labels"], -100), "num_items_in_batch": torch.tensor(50)}
    expected, found = results(model, own_loss, given), results(model, chunked_loss, given)
    assert float(found[0]) == float(expected[0]) == 0.0
    assert all(not grad.any() for grad in (*expected[1], *found[1]))


OTHERS = {
    "shift_labels": batch()["labels"],
    "ignore_index": 0,
    "label_smoothing": 0.1,
    "weight": torch.ones(VOCABULARY),
    "reduction": "sum",
    "logits_to_keep": 5,
    "output_router_logits": True,
    "vocab_size_of_mine": 3,
    "num_items_in_batch": torch.ones(3),
}


@pytest.mark.parametrize("argument", OTHERS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_arguments_that_change_the_loss_are_refused_in_every_call(name: str, argument: str) -> None:
    model, given = MODELS[name](), batch()
    for each in (given, {**given, argument: OTHERS[argument]}, {**given, argument: OTHERS[argument]}, given):
        if argument in each:
            with pytest.raises(ConfigError, match=f"batch: .*{argument}.*got"):
                chunked_loss(model, each)
        else:
            torch.testing.assert_close(chunked_loss(model, each), own_loss(model, each))


@pytest.mark.parametrize(
    "more",
    [
        {"position_ids": torch.arange(LENGTH).expand(ROWS, -1)},
        {"use_cache": True, "output_hidden_states": True},
        {"ignore_index": -100, "logits_to_keep": 0, "shift_labels": None},
        {"is_causal": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_arguments_that_do_not_change_it_are_passed_on(more: dict[str, Any]) -> None:
    model, given = made("llama"), {**batch(padded=True), **more}
    torch.testing.assert_close(chunked_loss(model, given), own_loss(model, given))


def test_a_cached_context_is_not_added_to_by_the_comparison() -> None:
    model, given = made("llama"), batch()
    rest = {"labels": given["labels"][:, 8:], "input_ids": given["input_ids"][:, 8:], "attention_mask": None}

    def cached() -> dict[str, Any]:
        cache = model(input_ids=given["input_ids"][:, :8], use_cache=True).past_key_values
        return {**rest, "past_key_values": cache}

    torch.testing.assert_close(chunked_loss(model, cached()), own_loss(model, cached()))


class WeighsItsTokens(hf.LlamaForCausalLM):
    """Names a tensor that its loss reads; GPT-2's old kin names some that it does not."""

    def forward(self, *args: Any, token_weights: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss is not None and token_weights is not None:
            out.loss = out.loss * token_weights.mean()
        return out


def test_values_that_may_be_read_are_compared_in_every_call() -> None:
    model, given = small(hf.LlamaConfig, WeighsItsTokens), batch()
    ones = torch.ones(ROWS, LENGTH)
    for _ in range(2):
        torch.testing.assert_close(chunked_loss(model, {**given, "token_weights": ones}), own_loss(model, given))
        with pytest.raises(ConfigError, match="losses are not those"):
            chunked_loss(model, {**given, "token_weights": 2 * ones})


class MeansOverRows(hf.LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if labels is not None:
            rows = zip(out.logits, labels, strict=True)
            losses = [nn.functional.cross_entropy(row[:-1], targets[1:]) for row, targets in rows]
            out.loss = torch.stack(losses).mean()
        return out


class MasksItsLoss(hf.LlamaForCausalLM):
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = None if labels is None else labels.masked_fill(kwargs["attention_mask"] == 0, -100)
        return super().forward(*args, labels=hidden, **kwargs)


class AddsWhileTraining(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss is not None and self.training:
            out.loss = out.loss + 0.01
        return out


@pytest.mark.parametrize("kind", [MeansOverRows, MasksItsLoss, AddsWhileTraining])
def test_another_way_to_the_loss_is_seen_on_a_few_tokens(kind: type) -> None:
    model = small(hf.LlamaConfig, kind)
    with pytest.raises(ConfigError, match="losses are not those"):
        chunked_loss(model.train(), batch())
    if kind is AddsWhileTraining:
        chunked_loss(model.eval(), batch())
        with pytest.raises(ConfigError, match="losses are not those"):
            chunked_loss(model.train(), batch())


def set_config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


def scaled_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)


def halve(module: nn.Module, *grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (grads[0][0] / 2,)


def other_class(model: Any) -> None:
    model.__class__ = AddsToItsLoss


def wrapped(model: Any) -> None:
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.loss = None if out.loss is None else out.loss * 2
        return out

    model.forward = forward


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("qwen2", set_config("final_logit_softcapping", 30.0), "logits are not those"),
        ("mixtral", set_config("output_router_logits", True), "the routers' loss"),
        ("qwen2", lambda model: setattr(model, "loss_function", lambda logits, labels, **_: logits.sum()), "losses"),
        ("qwen2", lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), "got Sequential"),
        ("qwen2", scaled_head, "logits are not those"),
        ("qwen2", other_class, "losses are not those"),
        ("qwen2", wrapped, "losses are not those"),
        ("qwen2", lambda model: model.lm_head.register_full_backward_hook(halve), "a backward hook"),
        ("qwen2", lambda model: model.lm_head.register_full_backward_pre_hook(halve), "a backward hook"),
    ],
    ids=["cap", "routers", "function", "head", "hook", "class", "forward", "backward_hook", "backward_pre_hook"],
)
def test_what_changes_after_the_first_call_is_seen(name: str, change: Callable[[Any], None], named: str) -> None:
    model = MODELS[name]()
    chunked_loss(model, batch())
    change(model)
    for _ in range(2):
        with pytest.raises(ConfigError, match=named):
            chunked_loss(model, batch())


def test_a_cap_that_changes_is_followed() -> None:
    model = MODELS["gemma2"]()
    for cap in (None, 30.0, 0.5, None):
        model.config.final_logit_softcapping = cap
        torch.testing.assert_close(chunked_loss(model, batch()), own_loss(model, batch()))


def test_a_call_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, compare = made("llama"), [], safe_peft.loss.check._compare
    monkeypatch.setattr(safe_peft.loss.check, "_compare", lambda *args: (calls.append(1), compare(*args)))
    for items in (1, 2, 3):
        chunked_loss(model, {**batch(), "num_items_in_batch": items})
        chunked_loss(model, batch(padded=True))
    assert len(calls) == 2
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None, "what is remembered of a model does not keep it"
