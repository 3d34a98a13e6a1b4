"""Decisions by bytes where a model does not run without values: learnt from a training's own forward, or refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from blocks import retained
from peft import LoraConfig, get_peft_model
from tiny import EARLY, adamw, batches, bert, randomise_adapters
from torch import nn

from safe_peft import AdapterFreezer, PlanError, SafeConfig
from safe_peft.planning.seen import Measurement

SHARE = {**EARLY, "score": "relative_norm", "freeze_by": "bytes", "target_fraction": 0.6, "freeze_interval": 4}
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4, "type": "default"}


def tokens(rows: int = 2, length: int = 12) -> dict[str, Any]:
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), tokens()


def qwen3_moe() -> tuple[nn.Module, dict[str, Any]]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**DECODER, **experts)), tokens()


def deberta() -> tuple[nn.Module, dict[str, Any]]:
    more = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "type_vocab_size": 0}
    config = transformers.DebertaV2Config(**SIZES, **more, max_position_embeddings=64)
    return transformers.DebertaV2ForSequenceClassification(config), {**tokens(), "labels": torch.tensor([0, 1])}


def wav2vec2() -> tuple[nn.Module, dict[str, Any]]:
    """LayerDrop leaves layers out at random, so that one forward does not show all."""
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    config = transformers.Wav2Vec2Config(**SIZES, **convolutions, **positions, layerdrop=0.4)
    batch = {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}
    batch["attention_mask"] = torch.ones(2, 400).long()
    return transformers.Wav2Vec2ForSequenceClassification(config), batch


def llava() -> tuple[nn.Module, dict[str, Any]]:
    vision = transformers.CLIPVisionConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=8, projection_dim=32
    )
    text = transformers.LlamaConfig(**DECODER)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=110, vision_feature_layer=-1
    )
    batch = {**tokens(), "pixel_values": torch.randn(2, 3, 16, 16)}
    batch["input_ids"][:, 1:5] = 110
    return transformers.LlavaForConditionalGeneration(config), batch


def qwen2_vl() -> tuple[nn.Module, dict[str, Any]]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    ids = {"image_token_id": 110, "vision_start_token_id": 108, "vision_end_token_id": 109, "video_token_id": 111}
    text = {**DECODER, "rope_scaling": ROPE, "rope_parameters": ROPE}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    batch = tokens()
    batch["input_ids"][:, 1:7] = torch.tensor([108, 110, 110, 110, 110, 109])
    pictures = {"pixel_values": torch.randn(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    kinds = {"mm_token_type_ids": (batch["input_ids"] == 110).long()}
    model = transformers.Qwen2VLForConditionalGeneration(config)
    return model, {**batch, **pictures, **kinds}


MODELS: list[Callable[[], tuple[nn.Module, dict[str, Any]]]] = [mixtral, qwen3_moe, deberta, wav2vec2, llava, qwen2_vl]
TARGETS = ["q_proj", "v_proj", "o_proj", "query_proj", "value_proj", "output_dense"]


def made(build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, batch = build()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)).train()
    randomise_adapters(model)
    return model, batch


def training(model: Any, batch: dict[str, Any], steps: int, **options: Any) -> AdapterFreezer:
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**SHARE | options))
    advance(model, batch, optimizer, freezer, steps)
    return freezer


def advance(model: Any, batch: dict[str, Any], optimizer: Any, freezer: AdapterFreezer, steps: int) -> None:
    for _ in range(steps):
        output = model(**batch)
        (output.loss if hasattr(output, "loss") else output).backward()
        optimizer.step()
        optimizer.zero_grad()
        freezer.step()


class Changing(nn.Module):
    """Larger batches take a way that no plan without values can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = float(x.abs().max()) if len(x) > 8 else 1.0
        return self.upper(self.lower(x).relu() * scale).square().mean()


def test_saved_tensors_stay_with_the_hooks_of_the_user() -> None:
    counts = []
    for unit in ("adapters", "bytes"):
        model, packed = bert(), []
        optimizer = adamw(model)
        freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"freeze_by": unit}))
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, seen=packed: seen.append(x.shape) or x, lambda x: x)
        for batch in batches(2):
            with hooks:
                model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            freezer.step()
        counts.append(packed)
        freezer.detach()
    assert counts[0] == counts[1] and len(counts[0]) > 20


class WithoutHooks(Changing):
    """Its forward permits no hooks for saved tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.lower(x)
        slope = torch.func.grad(lambda t: t.square().sum())(x)
        with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
            return self.upper(hidden.relu() + slope).square().mean()


def test_a_forward_that_permits_no_hooks_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(WithoutHooks(), LoraConfig(r=2, target_modules=["lower", "upper"]))
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"freeze_by": "bytes"}, target_fraction=0.5))
    disable = torch._C._autograd._saved_tensors_hooks_disable
    with caplog.at_level(logging.WARNING, logger="safe_peft"):
        advance(model, {"x": torch.randn(8, 8)}, optimizer, freezer, 16)
    (said,) = [one.message for one in caplog.records if one.name.startswith("safe_peft")]
    assert len(freezer.frozen) == 1 and 'freeze_by="bytes" cannot be used' in said
    assert torch._C._autograd._saved_tensors_hooks_disable is disable
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_larger_batch_that_cannot_be_planned_does_not_end_a_training(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(Changing(), LoraConfig(r=2, target_modules=["lower", "upper"]))
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY | {"freeze_by": "bytes"}, target_fraction=0.5))
    with caplog.at_level(logging.WARNING, logger="safe_peft"):
        advance(model, {"x": torch.randn(8, 8)}, optimizer, freezer, 1)
        assert not freezer.planner._measures, "the first batch can be planned"
        advance(model, {"x": torch.randn(16, 8)}, optimizer, freezer, 15)
    assert len(freezer.frozen) == 1 and not [one for one in caplog.records if one.name.startswith("safe_peft")]
    assert freezer.metrics()["safe/retained_bytes"] > 0


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_bytes_decide_in_models_whose_shapes_depend_on_data(
    build: Callable[[], tuple[nn.Module, dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = made(build)
    with caplog.at_level(logging.WARNING, logger="safe_peft"):
        freezer = training(model, batch, 16)
    assert not [record for record in caplog.records if record.name.startswith("safe_peft")]
    table = freezer.planner._unfrozen()
    assert freezer.frozen and table.bytes(freezer.frozen) < table.bytes()
    if build is not wav2vec2:
        assert retained(model, batch) == pytest.approx(table.bytes(freezer.frozen), rel=0.15)


def test_a_budget_is_met_by_what_was_measured() -> None:
    model, batch = made(deberta)
    full = training(model, batch, 1).planner._unfrozen().bytes()
    model, _ = made(deberta)
    freezer = training(model, batch, 16, memory_budget=int(0.7 * full), freeze_by="adapters", target_fraction=None)
    assert freezer.frozen and retained(model, batch) <= 0.7 * full


def test_measuring_changes_nothing() -> None:
    losses = []
    for unit in ("adapters", "bytes"):
        model, batch = made(deberta)
        torch.manual_seed(1)
        freezer = training(model, batch, 1, freeze_by=unit)
        losses.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        freezer.detach()
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)


def test_what_was_measured_lasts_over_a_restart() -> None:
    model, batch = made(deberta)
    straight = training(model, batch, 16)
    model, _ = made(deberta)
    half = training(model, batch, 8)
    assert half.frozen
    state = json.loads(json.dumps(half.state_dict()))
    half.detach()
    optimizer = adamw(model)
    rest = AdapterFreezer(model, optimizer, SafeConfig(**SHARE), first_step=8)
    rest.load_state_dict(state)
    advance(model, batch, optimizer, rest, 8)
    assert set(rest.frozen) == set(straight.frozen)


def test_an_interrupt_in_the_measured_forward_leaves_no_hooks() -> None:
    model, batch = made(deberta)
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**SHARE))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.base_model.model.classifier.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    advance(model, batch, optimizer, freezer, 1)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert freezer.planner._unfrozen().bytes() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_frees_what_the_other_does(reentrant: bool) -> None:
    model = bert(layers=3)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    freezer = training(model, next(batches(1)), 16)
    lowest = [name for name in freezer.frozen if ".layer.0." in name]
    assert len(lowest) == 6, "only a whole prefix frees anything"


def test_a_target_in_bytes_that_cannot_act_says_so_at_the_first_batch(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measurement, "end", lambda self, output: self.abandon() and None)
    model, batch = made(deberta)
    with caplog.at_level(logging.WARNING, logger="safe_peft"):
        freezer = training(model, batch, 1)
        (record,) = [record for record in caplog.records if "cannot be used" in record.message]
        assert "does not run without values" in record.message
    optimizer = adamw(model)
    freezer.detach()
    again = AdapterFreezer(model, optimizer, SafeConfig(**SHARE))
    advance(model, batch, optimizer, again, 16)
    assert len(again.frozen) == round(0.6 * len(again.adapters)), "by number instead"


def test_a_budget_that_cannot_act_is_refused_at_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Measurement, "end", lambda self, output: self.abandon() and None)
    model, batch = made(deberta)
    with pytest.raises(PlanError, match=r"memory_budget cannot be used: .* does not run without values"):
        training(model, batch, 1, memory_budget="1KiB", freeze_by="adapters")


def test_a_forward_that_nobody_sees_is_said_when_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = bert(), next(batches(1))
    optimizer = adamw(model)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**SHARE))
    with caplog.at_level(logging.WARNING, logger="safe_peft"), freezer.planner.suspended():
        advance(model, batch, optimizer, freezer, 16)
    assert sum("the training batch is unknown" in record.message for record in caplog.records) == 1
    assert freezer.frozen
