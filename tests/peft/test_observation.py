from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny import EARLY, adamw, batches, bert, train
from torch import nn

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
