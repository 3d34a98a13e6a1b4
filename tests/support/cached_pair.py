"""The same bound model without a prefix cache and with one, compared step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import VOCABULARY, adamw, bert, gpt2, randomise_adapters
from torch import Tensor, nn

from safe_peft import bind
from safe_peft.binding.blocks import transformer_blocks
from safe_peft.prefix.cache import PrefixCache
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


def first_of(output: Any) -> Any:
    """The hidden states that a block returns; in transformers 4 they are in a tuple."""
    return output[0] if isinstance(output, tuple) else output


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
