from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny import EARLY, adamw, batches, bert, gpt2, train
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from safe_kernels import reference
from safe_peft import AdapterFreezer, SafeConfig


def test_importance_is_that_of_the_rows_seen() -> None:
    """Against 1 - CKA in float64 of the same rows, padding left out, from features gathered by hooks of our own."""
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**{**EARLY, "score_interval": 4, "block_rows": 64}))
    train(model, optimizer, batches(3), freezer)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, layer: PeftLinear) -> None:
        def hook(module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
            X = out.detach().double().flatten(0, 1)
            A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
            delta = 2.0 * args[0].detach().double().flatten(0, 1) @ A.T @ B.T
            weight = batch["attention_mask"].flatten().double()
            sums = torch.zeros(2, 2, dtype=torch.float64)
            for start in range(0, len(X), 64):
                rows = weight[start : start + 64].bool()
                x, y = (f[start : start + 64][rows] for f in (X, X + delta))
                x, y = x - x.mean(0), y - y.mean(0)
                grams = torch.stack([x @ x.T, y @ y.T]).flatten(1)
                sums += grams @ grams.T
            seen[name] = 1 - sums[0, 1] / (sums[0, 0] * sums[1, 1]).sqrt()

        layer.base_layer.register_forward_hook(hook)

    for adapter in freezer.adapters:
        keep(adapter.name, adapter.layer)
    batch = next(batches(1, rows=16, seed=4))
    train(model, optimizer, iter([batch]), freezer)
    got = freezer.ledger.importance
    assert {name: float(value) for name, value in seen.items()} == pytest.approx(got, rel=1e-4, abs=1e-12)


def test_gradient_accumulation_adds_the_micro_batches() -> None:
    model = bert()
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY))
    for batch in batches(3):
        model(**batch).loss.backward()
    optimizer.step()
    sums = torch.tensor(freezer.state_dict()["evidence"]["sums"])
    assert sums.shape == (12, 4) and set(sums[:, 3].tolist()) == {
        sum(b["attention_mask"].sum().item() for b in batches(3))
    }
    freezer.step()
    assert freezer.ledger.scorings[0].importance == {
        adapter.name: reference.one_minus_cka(sums[index]) for index, adapter in enumerate(freezer.adapters)
    }


def test_only_training_is_scored() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    model.eval()
    model(**next(batches(1)))
    model.train()
    with freezer.suspended():
        model(**next(batches(1)))
    assert freezer.state_dict()["evidence"]["sums"] == []
    model(**next(batches(1)))
    assert freezer.state_dict()["evidence"]["sums"] != []


def test_nothing_is_observed_between_scorings() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**{**EARLY, "score_interval": 2}))
    model(**next(batches(1)))
    assert freezer.state_dict()["evidence"]["sums"] == []
    assert all(not adapter.state.observe for adapter in freezer.adapters if adapter.state is not None)


def test_a_mask_given_by_position_counts() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))
    batch = next(batches(1))
    model(batch["input_ids"], batch["attention_mask"])
    assert freezer.state_dict()["evidence"]["sums"][0][3] == batch["attention_mask"].sum().item()


def test_different_scorings_look_at_different_rows() -> None:
    model = bert()
    freezer = AdapterFreezer(model, adamw(model), SafeConfig(**EARLY, score_blocks=1, block_rows=16))
    batch = {**next(batches(1)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    sums = []
    for _ in range(2):
        model(**batch)
        sums.append(freezer.state_dict()["evidence"]["sums"][0])
        freezer.step()
    assert sums[0][3] == sums[1][3] == 16 and sums[0][0] != sums[1][0]


# ---------------------------------------------------------------- forwards that train, and no others


Sums = list[list[float]]


def observed(model: nn.Module | None = None) -> tuple[Any, AdapterFreezer]:
    model = bert() if model is None else model
    return model, AdapterFreezer(model, adamw(model), SafeConfig(**EARLY))


def sums_of(freezer: AdapterFreezer) -> Sums:
    found: Sums = freezer.state_dict()["evidence"]["sums"]
    return found


def expected(*data: dict[str, Tensor]) -> Any:
    """The sums of ordinary steps on these batches."""
    model, freezer = observed()
    for batch in data:
        model(**batch).loss.backward()
    return pytest.approx(torch.tensor(sums_of(freezer)), rel=1e-6)


def test_without_gradients_nothing_is_scored() -> None:
    model, freezer = observed()
    one, other = batches(2)
    with torch.no_grad():
        model(**other)
    with torch.inference_mode():
        model(**other)
    assert sums_of(freezer) == []
    model(**one).loss.backward()
    with torch.no_grad():  # a reference, say, between forward and backward
        model(**other)
    assert torch.tensor(sums_of(freezer)) == expected(one)


def test_generation_in_training_mode_is_not_scored() -> None:
    model, freezer = observed(gpt2())
    batch = next(batches(1))
    with torch.no_grad():
        model.generate(input_ids=batch["input_ids"][:, :4], max_new_tokens=3, pad_token_id=0)
    assert sums_of(freezer) == []


def dying(model: nn.Module, inside: str, error: type[BaseException]) -> Iterator[None]:
    def die(*args: Any) -> None:
        raise error("out of memory")

    handle = model.get_submodule(inside).register_forward_pre_hook(die)
    yield
    handle.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inside", ["base_model.model.bert.encoder.layer.1", "base_model.model.classifier"])
def test_a_forward_that_dies_counts_for_nothing(inside: str, error: type[BaseException]) -> None:
    model, freezer = observed()
    one, other = batches(2)
    for _ in dying(model, inside, error):
        with pytest.raises(error):
            model(**other)
    model(**one).loss.backward()
    assert torch.tensor(sums_of(freezer)) == expected(one)


def test_a_forward_tried_again_inside_the_handler_of_its_error_counts() -> None:
    model, freezer = observed()
    one, other = batches(2)
    try:
        for _ in dying(model, "base_model.model.classifier", RuntimeError):
            model(**other)
    except RuntimeError:
        model.base_model.model.classifier._forward_pre_hooks.clear()
        model(**one).loss.backward()
    assert torch.tensor(sums_of(freezer)) == expected(one)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_importance(reentrant: bool) -> None:
    """Two forwards before one backward, of different padding, so that what runs again may meet another's mask."""
    data = [{k: v[:6] for k, v in batch.items()} for batch in batches(2, length=12)]
    data[1] = {k: v[:4] if v.dim() == 1 else v[:4, :9] for k, v in data[1].items()}
    found = []
    for checkpointed in (False, True):
        model, freezer = observed()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        sum(model(**batch).loss for batch in data).backward()
        sums = torch.tensor(sums_of(freezer))
        found.append(sums / sums[:, 3:])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-12)


def test_padding_is_never_scored_where_masks_cannot_be_told_apart() -> None:
    """Reentrant checkpointing, two forwards of one shape before backward: rows that are real in both."""
    model, freezer = observed()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    one, other = batches(2)
    (model(**one).loss + model(**other).loss).backward()
    both = (one["attention_mask"] * other["attention_mask"]).sum().item()
    assert {row[3] for row in sums_of(freezer)} == {2.0 * both}


def test_a_model_that_is_checkpointed_whole_is_scored_once() -> None:
    model, freezer = observed()
    batch = next(batches(1))
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    rest = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    checkpoint(lambda x: model(inputs_embeds=x, **rest).loss, embedded, use_reentrant=True).backward()
    assert torch.tensor(sums_of(freezer)) == expected(batch)


def test_forwards_in_threads_keep_their_own_masks() -> None:
    model, freezer = observed()
    data = list(batches(4, seed=7))
    start = threading.Barrier(len(data))

    def forward(batch: dict[str, Tensor]) -> None:
        start.wait()
        model(**batch)

    threads = [threading.Thread(target=forward, args=(batch,)) for batch in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.tensor(sums_of(freezer)) == expected(*data)
