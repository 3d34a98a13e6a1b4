"""Whole models with quantised layers: blocks, plans, freezing, merging, saving, and a pretrained model in 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
from families import family
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantisers import KINDS, TORCHAO_ASKED, int8, quantised_llama
from tiny import BERT_TARGETS, EARLY, adamw, train
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safe_kernels.retention import measure
from safe_peft import AdapterFreezer, SafeConfig, bind, explain, plan_memory
from safe_peft.planning.live_bytes import LiveBytes

kinds = pytest.mark.parametrize("kind", KINDS)
BATCH = family("llama").batch()
FAST = "safe_kernels::lora"


def gradients(model: PeftModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours: Any, stock: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours[0], stock[0], rtol=tolerance, atol=0)
    assert ours[1].keys() == stock[1].keys() and ours[1]
    for name, grad in stock[1].items():
        assert (ours[1][name] - grad).norm() <= tolerance * grad.norm(), name


def quantised_bytes(model: nn.Module) -> list[Tensor]:
    """The base weights as they lie in memory: of a tensor that wraps others, as torchao's are, those."""

    def plain(tensor: Tensor) -> Iterator[Tensor]:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                yield from plain(getattr(tensor, name))
        else:
            yield tensor.detach().clone()

    held = [p for name, p in model.named_parameters() if "lora_" not in name]
    return [tensor for whole in [*held, *model.buffers()] for tensor in plain(whole)]


@kinds
def test_a_block_is_served_whole_and_gives_what_peft_gives(kind: str) -> None:
    model = quantised_llama(kind, layers=1)
    stock = gradients(model, BATCH)
    before = quantised_bytes(model)
    with bind(model):
        # A difference in the last bit may make an activation another int8.
        assert_same_step(gradients(model, BATCH), stock, 1e-2 if kind == "torchao-int8-dynamic" else 1e-4)
        found = explain(model)
    assert {row.path for row in found} == {FAST} and len(found) == 7
    assert sorted(part.path for part in found.parts) == [
        "safe_kernels::gated_activation",
        *["safe_kernels::rms_norm"] * 3,
        "safe_kernels::rotary",
    ]
    for after, was in zip(quantised_bytes(model), before, strict=True):
        assert torch.equal(after, was), "binding and training leave the quantised weights alone"


@kinds
def test_a_plan_is_what_is_measured(kind: str) -> None:
    model = quantised_llama(kind, lora_dropout=0.1)
    plan = plan_memory(model, batch=BATCH, frozen=["*.layers.0.*", "*.layers.1.mlp.*"])
    binding = bind(model)
    for adapter in binding.live_adapters():
        if adapter.name in plan.frozen:
            adapter.freeze()
    assert len(plan.frozen) == 10
    assert plan.ours.retained == measure(lambda: model(**BATCH).loss, exclude=model.parameters()).bytes
    model.zero_grad()
    scales = [module.state.SCB for module in model.modules() if kind == "bnb-8bit" and hasattr(module, "state")]
    with LiveBytes([*model.parameters(), *model.buffers(), *BATCH.values(), *scales]) as live:
        model(**BATCH).loss.backward()
    assert plan.ours.step == pytest.approx(live.peak, rel=0.01), "what 8 bits keep out of the hooks' sight is in it"


def test_a_plan_counts_the_scales_of_4_bits() -> None:
    model = quantised_llama("bnb-4bit")
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    scales = {t.untyped_storage().data_ptr(): t.nbytes for s in states for t in (s.absmax, s.code, s.offset)}
    nested = {t.untyped_storage().data_ptr(): t.nbytes for s in states for t in (s.state2.absmax, s.state2.code)}
    assert len(states) == 14
    assert plan_memory(model, batch=BATCH).parameters == held + sum((scales | nested).values())


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-int8", "hqq", "gptq-stand-in"])
def test_freezing_retains_less_and_trains_as_peft_does_with_the_same_frozen(kind: str) -> None:
    model = quantised_llama(kind, lora_dropout=0.0)
    optimizer, before = adamw(model), measure(lambda: model(**BATCH).loss, exclude=model.parameters()).bytes
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**EARLY, target_fraction=0.75))
    losses = train(model, optimizer, repeat(BATCH, 16), freezer)
    assert len(freezer.frozen) in (10, 11) and not freezer.unscored
    assert losses[-1] < losses[0] and all(0 < value < 1 for value in freezer.ledger.importance.values())
    ours = gradients(model, BATCH)
    assert measure(lambda: model(**BATCH).loss, exclude=model.parameters()).bytes < before
    live = {name for name, p in model.named_parameters() if p.requires_grad}
    freezer.detach()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in live)
    assert_same_step(ours, gradients(model, BATCH))


def test_a_frozen_block_of_4_bits_runs_again_in_backward() -> None:
    model = quantised_llama("bnb-4bit")
    binding = bind(model)
    for adapter in binding.live_adapters():
        if ".layers.1." in adapter.name:
            adapter.freeze()
    kept, expected = measure(lambda: model(**BATCH).loss, exclude=model.parameters()).bytes, gradients(model, BATCH)
    binding.recompute.update(binding.blocks)
    assert measure(lambda: model(**BATCH).loss, exclude=model.parameters()).bytes < kept
    assert_same_step(gradients(model, BATCH), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_preparing_for_k_bit_training_is_followed(use_reentrant: bool) -> None:
    """Norms and adapters in fp32 over a bf16 model in 4 bits, with activation checkpointing: QLoRA's own recipe."""

    def make() -> PeftModel:
        base = quantised_llama("bnb-4bit", dtype=torch.bfloat16).unload()
        options = {"use_reentrant": use_reentrant}
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=options)
        torch.manual_seed(0)
        targets = list(family("llama").targets)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(base, config).train()

    stock = gradients(make(), BATCH)
    model = make()
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    bind(model)
    assert {row.path for row in explain(model)} == {FAST}
    assert_same_step(gradients(model, BATCH), stock)


# ---------------------------------------------------------------- PEFT's life


def outcome(run: Callable[[], Tensor]) -> Tensor | tuple[type[Exception], str]:
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("unload", [False, True], ids=["merge", "merge_and_unload"])
@kinds
def test_merging_does_what_it_does_in_peft_errors_included(kind: str, unload: bool) -> None:
    def run(bound: bool) -> Tensor:
        model = quantised_llama(kind, layers=1)
        for layer in model.modules():
            if kind == "torchao-int8" and hasattr(layer, "get_apply_tensor_subclass"):
                layer.get_apply_tensor_subclass = int8  # as PEFT sets it where transformers quantised the model
        if bound:
            bind(model)
        with torch.no_grad():
            if unload:
                return model.merge_and_unload()(**BATCH).logits
            model.merge_adapter()
            merged = model(**BATCH).logits
            model.unmerge_adapter()
            return torch.cat([merged, model(**BATCH).logits])

    ours, stock = outcome(lambda: run(True)), outcome(lambda: run(False))
    merges = {"bnb-4bit", "bnb-8bit", "torchao-int8", "hqq", *({"torchao-int4"} & TORCHAO_ASKED.keys())}
    assert isinstance(stock, Tensor) == (kind in merges)
    if isinstance(stock, Tensor):
        torch.testing.assert_close(ours, stock)
    else:
        assert ours == stock


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit", "torchao-int8", "hqq", "gptq-stand-in"])
def test_a_saved_adapter_loads_over_a_fresh_base(kind: str, tmp_path: Path) -> None:
    model = quantised_llama(kind, layers=1)
    bind(model)
    model.save_pretrained(tmp_path)
    base = quantised_llama(kind, layers=1).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, config=model.peft_config["default"]).train()
    stock = gradients(loaded, BATCH)
    bind(loaded)
    assert_same_step(gradients(loaded, BATCH), stock)
    torch.testing.assert_close(loaded(**BATCH).logits, model(**BATCH).logits)


# ---------------------------------------------------------------- the real thing, small


@pytest.fixture(scope="module")
def weights() -> Path:
    return assets.fetch("minilm")


def texts(weights: Path, count: int) -> Iterator[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights)
    rows = ["a moving , funny film", "a dull and endless film", "funny", "endless and dull , with no plot"]
    for _ in range(count):
        yield {**tokenizer(rows, padding=True, return_tensors="pt"), "labels": torch.tensor([1, 0, 1, 0])}


def test_minilm_in_4_bits_learns_while_three_quarters_freeze(weights: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    def make() -> PeftModel:
        torch.manual_seed(0)
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier"],  # it is new, and trains whole
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            weights,
            num_labels=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            quantization_config=options,
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=BERT_TARGETS)).train()

    stock, model = make(), make()
    expected = train(stock, adamw(stock, 1e-3), texts(weights, 3))
    optimizer = adamw(model, 1e-3)
    freezer = AdapterFreezer(model, optimizer, SafeConfig(freeze_by="adapters"), total_steps=24)
    losses = train(model, optimizer, texts(weights, 24), freezer)
    assert losses[:3] == pytest.approx(expected, rel=1e-2)
    assert losses[-1] < 0.1 < losses[0]
    assert len(freezer.frozen) == 27 and not freezer.unscored
    assert {row.path for row in explain(model)} == {FAST} and len(explain(model)) == 36
