"""What happens between forward and backward of a frozen block that runs again, and to its graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from blocks import freeze_block
from families import family
from peft import LoraConfig, PeftModel, get_peft_model
from recomputed import IDS, Stack, compare, frozen_above_the_first, llama, made, same, step
from tiny import randomise_adapters
from torch import Tensor, nn
from torch.nn.utils import prune

from safe_kernels.retention import measure
from safe_peft import Binding, bind

# ---------------------------------------------------------------- between forward and backward


def later(model: PeftModel, what: str, binding: Binding, undo: ExitStack) -> Callable[[], Tensor]:
    """A loss whose backward comes when something else has happened to the model."""

    def compute() -> Tensor:
        model.train()
        if what == "adapter disabled":
            with model.disable_adapter():
                below = model.base_model.model.model.embed_tokens(IDS).requires_grad_()
                loss = model(inputs_embeds=below, labels=IDS).loss
            return loss
        loss = model(input_ids=IDS, labels=IDS).loss
        if what == "eval":
            model.eval()
        elif what == "dropout":
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.9
        elif what == "hook":
            model.base_model.model.model.layers[2].register_forward_hook(lambda module, args, out: out * 3)
        elif what == "hook on all modules":
            undo.callback(nn.modules.module.register_module_forward_hook(lambda *given: given[-1] * 3).remove)
        elif what == "forward":
            model.base_model.model.model.layers[2].mlp.forward = lambda x: x
        elif what == "detached":
            binding.detach()
        return loss

    return compute


@pytest.mark.parametrize(
    "what", ["eval", "dropout", "hook", "hook on all modules", "forward", "detached", "adapter disabled"]
)
def test_modules_are_as_they_were_in_forward(what: str) -> None:
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            llama(attention_dropout=0.2), LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.3)
        )
        randomise_adapters(model.train())
        with frozen_above_the_first(model) as binding, ExitStack() as undo:
            if again:
                binding.recompute.update(binding.blocks)
            torch.manual_seed(5)
            results.append(step(model, later(model, what, binding, undo)))
    same(*results)


def test_a_parameter_that_is_pruned_in_between_is_refused() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding:
        binding.recompute.update(binding.blocks)
        loss = model(input_ids=IDS, labels=IDS).loss
        prune.l1_unstructured(model.base_model.model.model.layers[2].input_layernorm, "weight", amount=0.3)
        with pytest.raises(RuntimeError, match=r"weight of a LlamaRMSNorm in .*layers\.2 was replaced between"):
            loss.backward()


def test_an_optimizer_that_steps_in_between_is_refused_as_by_autograd() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding:
        binding.recompute.update(binding.blocks)
        loss = model(input_ids=IDS, labels=IDS).loss
        with torch.no_grad():
            model.base_model.model.model.layers[2].mlp.down_proj.weight.add_(1.0)
        with pytest.raises(
            RuntimeError, match=r"modified by an inplace operation.*model\.layers\.2|layers\.2.*modified"
        ):
            loss.backward()


def test_a_norm_that_is_written_to_through_data_in_between_is_noticed() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding:
        binding.recompute.update(binding.blocks)
        loss = model(input_ids=IDS, labels=IDS).loss
        model.base_model.model.model.layers[2].input_layernorm.weight.data[0] = 0.0
        with pytest.raises(RuntimeError, match=r"weight of a LlamaRMSNorm in .*layers\.2 was modified"):
            loss.backward()


def test_an_argument_that_is_written_to_later_is_named() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Stack("plain"), LoraConfig(target_modules=["lin"], init_lora_weights=False)).train()
    seen: list[Tensor] = []
    with frozen_above_the_first(model) as binding:
        binding.recompute.update(binding.blocks)
        model.base_model.model.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        loss = model(torch.randn(4, 8))
        seen[0].data = seen[0].data  # keeps its version
        with torch.no_grad():
            seen[0].add_(1.0)
        with pytest.raises(RuntimeError, match=r"blocks\.1.*written to in place.*clone"):
            loss.backward()


def test_a_block_that_does_something_else_the_second_time_is_noticed() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Stack("plain"), LoraConfig(target_modules=["lin"], init_lora_weights=False)).train()
    odd = iter(range(100))
    model.base_model.model.blocks[1].register_forward_hook(lambda m, a, out: out.sin() if next(odd) % 2 else out)
    with frozen_above_the_first(model) as binding:
        binding.recompute.update(binding.blocks)
        with pytest.raises(RuntimeError, match=r"blocks\.1 was recomputed.*binding\.recompute"):
            model(torch.randn(4, 8)).backward()


# ---------------------------------------------------------------- graphs


def test_backward_twice_and_by_parts() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding:
        results = []
        for names in ((), binding.blocks):
            binding.recompute.update(names)
            loss = model(input_ids=IDS, labels=IDS).loss
            live = [p for p in model.parameters() if p.requires_grad]
            one = torch.autograd.grad(loss, live[:1], retain_graph=True)
            rest = torch.autograd.grad(loss, live)
            results.append({str(index): grad for index, grad in enumerate([*one, *rest])})
    same(*results)


def test_two_forwards_before_one_backward() -> None:
    model = made("llama")

    def compute() -> Tensor:
        return model(input_ids=IDS, labels=IDS).loss + model(input_ids=IDS.flip(1), labels=IDS).loss

    compare(model, compute)


def test_nothing_outlives_the_graph() -> None:
    model = made("llama")
    with frozen_above_the_first(model) as binding:
        binding.recompute.update(binding.blocks)
        seen: list[weakref.ref[Tensor]] = []
        layer = model.base_model.model.model.layers[1]
        layer.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
        gc.collect()
        gc.disable()
        try:
            loss = model(input_ids=IDS, labels=IDS).loss
            assert seen[0]() is not None
            loss.backward()
            assert all(ref() is None for ref in seen), "backward lets go of everything"
            loss = model(input_ids=IDS, labels=IDS).loss
            del loss
            assert all(ref() is None for ref in seen), "so does dropping the loss"
        finally:
            gc.enable()


@pytest.mark.parametrize("one", [family(name) for name in ("gpt2", "t5", "bert", "vit")], ids=str)
def test_other_families_with_their_defaults(one: Any) -> None:
    model, batch = one.model(layers=3), one.batch()
    compare(model, lambda: model(**batch).loss)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_a_norm_at_the_end_of_a_block_that_runs_again(name: str) -> None:
    """A layer that trains reads it in the block above: what the norm keeps is the same as without running again."""
    one = family(name)
    model, batch = one.model(layers=3), one.batch()
    with bind(model) as binding:
        freeze_block(model, binding.blocks[1])
        expected = step(model, lambda: model(**batch).loss)
        without = measure(lambda: model(**batch).loss, exclude=model).bytes
        binding.recompute.add(binding.blocks[1])
        same(step(model, lambda: model(**batch).loss), expected)
        assert measure(lambda: model(**batch).loss, exclude=model).bytes < without
