"""A plan for a GPU needs none, and says to the byte what one measured; a loss of one's own is planned as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import LENGTH, ROWS, family
from gpu import planned
from gpu.results import read
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from safe_kernels import retention
from safe_peft import ConfigError, PlanError, bind, plan_memory
from safe_peft.loss import own_loss
from safe_peft.planning.inputs import inputs_for
from safe_peft.planning.tracing import AsOnGpu, device_kind, trace

MEASURED = read(planned.MEASURED)
WORKSPACES = 96 * 2**20
"""What CUDA's libraries allocate for themselves, at most; 64 MiB of it were there."""
ON_A_GPU = [
    ("1B", "peft", "nothing"),
    ("1B", "peft", "lower half"),
    ("1B", "safe", "every other"),
    ("1B", "safe, float32", "nothing"),
]
"""Some of what was measured; `python -m bench.gpu.planned` goes through all of it."""


@pytest.mark.parametrize(("size", "provider", "frozen"), ON_A_GPU)
def test_the_peak_is_the_one_that_a_gpu_measured(size: str, provider: str, frozen: str) -> None:
    rows = MEASURED["parts"]["steps"]["rows"]
    (row,) = [row for row in rows if (row["size"], row["provider"], row["frozen"]) == (size, provider, frozen)]
    assert 0 <= row["peak_bytes"] - planned.plan(size, provider, frozen) <= WORKSPACES


def test_the_table_of_plans(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["planned", "--sizes", "tiny"])
    monkeypatch.setattr(planned, "LAYOUTS", ("lower half",))
    planned.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(planned.PROVIDERS)
    assert all(" MiB " in line and "measured" not in line for line in lines), "nobody measures the tiny one"


# ---------------------------------------------------------------- what a GPU keeps that a CPU does not


def stock(name: str, device: str, p: float) -> int:
    model = family(name).model(layers=1, p=p, lora_dropout=p, dtype=torch.bfloat16)
    return trace(model, inputs_for(model, ROWS, LENGTH), fast=False, device=device).retained


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_masks_of_dropout_are_bytes(name: str) -> None:
    assert stock(name, "cuda", 0.0) == stock(name, "cpu", 0.0) == stock(name, "", 0.0)
    assert stock(name, "cuda", 0.0) < stock(name, "cuda", 0.1) < stock(name, "cpu", 0.1)


@pytest.mark.parametrize("fast", [False, True])
def test_the_same_ops_run_on_real_tensors(fast: bool) -> None:
    """Everything a CPU can show of it: the ops that stand for the GPU's, on tensors with values."""
    one = family("gpt2")
    model = one.model(p=0.1, lora_dropout=0.1)
    told = trace(model, inputs_for(model, ROWS, LENGTH), fast=fast, device="cuda").retained
    if fast:
        bind(model)
    batch = one.batch()
    with AsOnGpu():
        measured = retention.measure(lambda: model(**batch).loss, exclude=[model, *batch.values()])
    assert told == measured.bytes


def test_attention_with_a_dropout_keeps_no_probabilities() -> None:
    q = torch.randn(1, 2, 64, 8, requires_grad=True)

    def kept(p: float) -> int:
        return retention.measure(lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=p)).bytes

    plain = kept(0.0)
    with AsOnGpu():
        assert kept(0.1) == plain < 64 * 64 * 4
    assert kept(0.1) > 64 * 64 * 4


def test_dropout_that_does_nothing_is_left_alone() -> None:
    x = torch.ones(8, requires_grad=True)
    with AsOnGpu():
        assert F.dropout(x, 0.5, training=False) is x
        assert bool((F.dropout(x, 1.0) == 0).all()) and bool((F.dropout(x, 0.0) == 1).all())
        kept = F.dropout(x, 0.5)
    assert set(kept.tolist()) <= {0.0, 2.0}
    with pytest.raises(ValueError, match="dropout probability"), AsOnGpu():
        F.dropout(x, 1.5)


@pytest.mark.parametrize(("device", "kind"), [(None, ""), ("cuda:1", "cuda"), (torch.device("cpu"), "cpu")])
def test_kinds_of_devices(device: Any, kind: str) -> None:
    assert device_kind(device) == kind
    model = family("llama").model(layers=1, lora_dropout=0.1)
    plan = plan_memory(model, ROWS, LENGTH, device=device)
    assert plan.device == (kind or "cpu") and f", {plan.device}: 0 of" in str(plan)


@pytest.mark.parametrize("device", ["tpu", "", 0, "meta"])
def test_other_devices_are_refused(device: Any) -> None:
    with pytest.raises(PlanError, match="device: expected cpu or cuda, where the model will train, got"):
        plan_memory(family("llama").model(), ROWS, LENGTH, device=device)


# ---------------------------------------------------------------- a loss of one's own


def chunked(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    hidden = model.base_model.model.model(input_ids=batch["input_ids"]).last_hidden_state.flatten(0, 1)
    head = model.base_model.model.lm_head

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels)

    pieces = zip(hidden.split(8), batch["labels"].flatten().split(8), strict=True)
    return sum((checkpoint(part, *piece, use_reentrant=False) for piece in pieces), torch.zeros(()))


def test_a_loss_of_ones_own() -> None:
    model = family("llama").model(layers=1)
    plain = plan_memory(model, ROWS, LENGTH)
    assert plan_memory(model, ROWS, LENGTH, loss=own_loss) == plain
    in_chunks = plan_memory(model, ROWS, LENGTH, loss=chunked)
    for now, before in ((in_chunks.stock, plain.stock), (in_chunks.ours, plain.ours)):
        assert now.by_part.get("head and loss", 0) < before.by_part["head and loss"]
        assert now.peak < before.peak
        assert now.by_part["MLP"] == before.by_part["MLP"]


def test_a_loss_that_cannot_be_planned_is_refused() -> None:
    model = family("llama").model(layers=1)
    with pytest.raises(ConfigError, match=r"loss: expected a function of a model and a batch, got 0\.5"):
        plan_memory(model, ROWS, LENGTH, loss=0.5)
    with pytest.raises(PlanError, match="does not run without values"):
        plan_memory(model, ROWS, LENGTH, loss=lambda copy, batch: model(**batch).loss)
    for wrong, got in (
        (lambda copy, batch: copy(**batch), "Output"),
        (lambda copy, batch: copy(**batch).logits, "one of"),
    ):
        with pytest.raises(PlanError, match=rf"loss: expected a tensor of one element, got \S*{got}"):
            plan_memory(model, ROWS, LENGTH, loss=wrong)
