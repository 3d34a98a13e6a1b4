"""A training step of a BERT-shaped model with bottleneck adapters of 48 units, ours compared with the tuner unbound.

Random weights: 2 blocks, d 768, 8 x 64 tokens. *frozen* means that all adapters but those of the lowest block are
frozen, so that a gradient passes through all others.
"""

from __future__ import annotations

import pytest
import torch
from minilm import Step
from peft import get_peft_model
from pytest_benchmark.fixture import BenchmarkFixture
from step_pairs import compare_with_stock
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from safe_peft.bottleneck import BottleneckConfig

BLOCKS, UNITS, ROWS, LENGTH = 2, 48, 8, 64


def make_step(non_linearity: str, p: float, frozen: bool) -> Step:
    """The step, and its adapters frozen as stock PEFT can: by requires_grad."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=BLOCKS, hidden_dropout_prob=p, attention_probs_dropout_prob=0.0)
    base = BertForSequenceClassification(config)
    units = config.hidden_size / UNITS
    adapters = BottleneckConfig(task_type="SEQ_CLS", reduction_factor=units, non_linearity=non_linearity, dropout=p)
    model = get_peft_model(base, adapters).train()
    for name, parameter in model.named_parameters():
        if frozen and "bottleneck_" in name and ".layer.0." not in name:
            parameter.requires_grad_(False)
    return Step(model, make_batch(config.vocab_size))


def make_batch(vocabulary: int) -> dict[str, Tensor]:
    """Random words, no padding."""
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.zeros(ROWS, dtype=torch.int64)}


@pytest.mark.parametrize("provider", ["peft", "safe"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("non_linearity", "p"), [("relu", 0.0), ("gelu", 0.0), ("relu", 0.1)])
def test_bottleneck_step(
    benchmark: BenchmarkFixture, non_linearity: str, p: float, frozen: bool, provider: str
) -> None:
    compare_with_stock(benchmark, lambda: make_step(non_linearity, p, frozen), provider, same_loss=p == 0.0)
