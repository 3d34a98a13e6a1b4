"""The scripts themselves: one for each thing that PEFT's users do with a model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import torch
from life import gradients, logits, scenario, tokens
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny import gpt2, randomise_adapters

SECOND = LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)


def add_second(model: PeftModel) -> None:
    model.add_adapter("second", SECOND)
    randomise_adapters(model, 0.2)


def saved(folder: Path, **lora: Any) -> str:
    """An adapter that somebody else has trained."""
    other = gpt2(**lora)
    randomise_adapters(other, 0.3)
    other.save_pretrained(folder / "other")
    return str(folder / "other")


@scenario()
def use_it(model: PeftModel, folder: Path) -> Any:
    return logits(model), gradients(model), model.generate(**tokens(), max_new_tokens=3, do_sample=False)


@scenario(shows_flags=True)
def ask_about_it(model: PeftModel, folder: Path) -> Any:
    layers = [str(status) for status in model.get_layer_status()]
    return layers, str(model.get_model_status()), model.get_nb_trainable_parameters()


@scenario()
def add_an_adapter_and_switch(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model), gradients(model)
    model.set_adapter("default")
    return first, second, logits(model)


@scenario(fails=None)  # PEFT 0.18 adds it again
def add_an_adapter_twice(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    add_second(model)


@scenario(fails="ValueError")
def set_an_adapter_that_is_not_there(model: PeftModel, folder: Path) -> Any:
    model.set_adapter("nowhere")


@scenario()
def have_several_active(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    model.base_model.set_adapter(["default", "second"])
    return logits(model), gradients(model), model.active_adapters


@scenario()
def route_rows_to_adapters(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    return logits(model, adapter_names=["second", "__base__", "default"])


@scenario(fails="ValueError")
def route_rows_in_training(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    logits(model.train(), adapter_names=["second", "__base__", "default"])


@scenario()
def disable_adapters(model: PeftModel, folder: Path) -> Any:
    with model.disable_adapter():
        off = logits(model)
    model.train()
    with model.disable_adapter():
        off_in_training = logits(model)
    return off, off_in_training, logits(model), gradients(model)


@scenario()
def merge_and_unmerge(model: PeftModel, folder: Path) -> Any:
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    return merged, logits(model), gradients(model)


@scenario()
def disable_while_merged(model: PeftModel, folder: Path) -> Any:
    model.merge_adapter()
    with model.disable_adapter():
        off = logits(model)
    return off, logits(model)


@scenario()
def merge_one_of_two(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    model.merge_adapter(["second"])
    return logits(model), [name for name, _ in model.merge_and_unload().named_parameters()]


@scenario()
def merge_and_unload(model: PeftModel, folder: Path) -> Any:
    plain = model.merge_and_unload()
    return logits(plain), repr(plain)


@scenario(fails="ValueError")
def merge_safely_what_is_broken(model: PeftModel, folder: Path) -> Any:
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    model.merge_adapter(safe_merge=True)


@scenario()
def unload(model: PeftModel, folder: Path) -> Any:
    plain = model.unload()
    return logits(plain), repr(plain)


@scenario()
def save_and_load(model: PeftModel, folder: Path) -> Any:
    model.save_pretrained(folder / "mine")
    base = gpt2().unload()
    again = PeftModel.from_pretrained(base, folder / "mine", is_trainable=True).eval()
    return logits(again), gradients(again), PeftConfig.from_pretrained(folder / "mine").to_dict()


@scenario()
def load_beside(model: PeftModel, folder: Path) -> Any:
    result = model.load_adapter(saved(folder, r=2), "second", is_trainable=True)
    model.set_adapter("second")
    return str(result), logits(model), gradients(model)


@scenario()
def load_over(model: PeftModel, folder: Path) -> Any:
    model.load_adapter(saved(folder), "default", is_trainable=True)
    return logits(model), gradients(model)


@scenario(fails="RuntimeError")
def load_what_does_not_fit(model: PeftModel, folder: Path) -> Any:
    model.load_adapter(saved(folder, r=2), "default")


@scenario(fails="ValueError")
def load_from_nowhere(model: PeftModel, folder: Path) -> Any:
    model.load_adapter("/nowhere/at/all", "second")


@scenario()
def hotswap(model: PeftModel, folder: Path) -> Any:
    hotswap_adapter(model, saved(folder), "default")
    model.set_adapter("default")  # in PEFT 0.18 what came in does not train
    return logits(model), gradients(model)


@scenario()
def hotswap_to_a_larger_rank(model: PeftModel, folder: Path) -> Any:
    hotswap_adapter(model, saved(folder, r=8), "default")
    stopped = [name for name, p in model.named_parameters() if p.requires_grad]  # the tensors that came in train not
    model.set_adapter("default")
    return stopped, logits(model), gradients(model)


@scenario()
def hotswap_after_preparing(model: PeftModel, folder: Path) -> Any:
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    before = logits(model), gradients(model)
    hotswap_adapter(model, saved(folder, r=6), "default")
    model.set_adapter("default")
    return before, logits(model), gradients(model)


@scenario(fails="RuntimeError")
def hotswap_other_layers(model: PeftModel, folder: Path) -> Any:
    hotswap_adapter(model, saved(folder, target_modules=["c_attn", "lm_head"]), "default")


@scenario()
def delete_one_of_two(model: PeftModel, folder: Path) -> Any:
    add_second(model)
    model.set_adapter("second")
    model.delete_adapter("second")
    return model.active_adapters, logits(model)


@scenario(fails="ValueError")
def delete_what_is_not_there(model: PeftModel, folder: Path) -> Any:
    model.delete_adapter("nowhere")


@scenario()
def combine_adapters(model: PeftModel, folder: Path) -> Any:
    model.add_adapter(
        "second", LoraConfig(**{**SECOND.to_dict(), "r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"]})
    )
    randomise_adapters(model, 0.2)
    results = []
    for kind in ("linear", "cat", "svd"):
        model.add_weighted_adapter(["default", "second"], [0.6, 0.4], kind, combination_type=kind)
        model.set_adapter(kind)
        results.append(logits(model))
    return results


@scenario()
def rescale(model: PeftModel, folder: Path) -> Any:
    with rescale_adapter_scale(model, 0.5):
        half = logits(model), gradients(model)
    return half, logits(model)


@scenario()
def pass_state_dicts(model: PeftModel, folder: Path) -> Any:
    own = get_peft_model_state_dict(model)
    loaded = set_peft_model_state_dict(model, {name: 2 * value for name, value in own.items()})
    return own, str(loaded), logits(model), model.load_state_dict(model.state_dict()) and None


@scenario()
def copy_it(model: PeftModel, folder: Path) -> Any:
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    twin.set_adapter("default")
    return logits(twin), gradients(twin), logits(loaded), repr(loaded)


@scenario()
def switch_modes(model: PeftModel, folder: Path) -> Any:
    return logits(model.train()), logits(model.eval()), gradients(model.train())


@scenario()
def move_to_other_dtypes(model: PeftModel, folder: Path) -> Any:
    results = [(logits(model), gradients(model)) for model in (model.double(), model.bfloat16(), model.half())]
    return results, logits(model.to(torch.float32))


@scenario()
def move_to_another_device(model: PeftModel, folder: Path) -> Any:
    model.to("meta")
    shape = model(input_ids=tokens()["input_ids"].to("meta")).logits.shape
    return list(shape), {str(p.device) for p in model.parameters()}


@scenario()
def checkpoint_activations(model: PeftModel, folder: Path) -> Any:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    return gradients(model.train())
