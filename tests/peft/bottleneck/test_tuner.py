"""The tuner as PEFT's users use it: positions, values, files, several adapters, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapted import adapted, adapted_bert, adapted_family, randomise
from more_families import EVERY, MOE, TWO_STACKS
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import batches, bert, gpt2
from torch import Tensor, nn

from safe_peft.bottleneck import BottleneckConfig, BottleneckLayer

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
FILES = ("README.md", "adapter_model.safetensors", "adapter_config.json")
LASTS = {
    "bert": ("attention.output.dense", "output.dense"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "distilbert": ("attention.out_lin", "ffn.lin2"),
    "mpnet": ("attention.attn.o", "output.dense"),
    "t5": ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"),
}


def layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}


def logits(model: nn.Module) -> Tensor:
    batch = next(batches(1))
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", LASTS)
def test_positions(name: str, placement: str) -> None:
    """After attention and MLP, of every block and of nothing else."""
    found = layers(adapted_family(name, placement=placement))
    lasts = LASTS[name] if placement == "houlsby" else LASTS[name][-1:]
    blocks = {"t5": 4}.get(name, 2)
    count = 10 if (name, placement) == ("t5", "houlsby") else blocks * len(lasts)
    assert len(found) == count
    assert all(any(path.endswith(f".{last}") for last in lasts) for path in found)


@pytest.mark.parametrize("name", sorted(set(EVERY) - MOE))
def test_every_familys_blocks_are_recognised(name: str) -> None:
    found = layers(adapted(EVERY[name].model().unload()))
    assert len(found) == {True: 10, False: 4}[name in TWO_STACKS]
    assert all(layer.out_features == next(iter(found.values())).out_features for layer in found.values())


def mlp(layer: Any, x: Tensor) -> Tensor:
    """The adapter's part by its definition."""
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    return 0.5 * F.linear(F.gelu(F.linear(x, down.weight, down.bias)), up.weight, up.bias)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_values(placement: str) -> None:
    model = adapted_bert(placement=placement, non_linearity="gelu", scaling=0.5).eval()
    first = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    seen: dict[str, Tensor] = {}
    first.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    for path, layer in layers(model).items():
        layer.register_forward_hook(lambda m, args, out, path=path: seen.update({path: (args[0], out)}))
    logits(model)
    for path, layer in layers(model).items():
        x, out = seen[path]
        base = layer.base_layer(x)
        if placement != "parallel":
            torch.testing.assert_close(out, base + mlp(layer, base))
        elif ".0." in path:
            torch.testing.assert_close(out, base + mlp(layer, seen["x"]))
            assert layer._input.value is None, "the input is kept during the forward only"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_new_adapter_changes_nothing_and_alone_trains(placement: str) -> None:
    base = bert().unload()
    expected = logits(base)
    config = BottleneckConfig(placement=placement, task_type="SEQ_CLS")
    model = get_peft_model(base, config)
    assert torch.equal(logits(model), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("bottleneck_" in name or "classifier.modules_to_save" in name for name in trained)
    assert {layer.bottleneck_down["default"].out_features for layer in layers(model).values()} == {2}, "32 / 16"
    randomise(model)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_save_and_load(placement: str, tmp_path: Path) -> None:
    model = adapted_bert(placement=placement, non_linearity="silu", dropout=0.1)
    model.save_pretrained(tmp_path / "first")
    assert {path.name for path in (tmp_path / "first").iterdir()} == set(FILES)
    again = PeftModel.from_pretrained(bert().unload(), tmp_path / "first", is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    assert PeftConfig.from_pretrained(tmp_path / "first").placement == placement
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again.save_pretrained(tmp_path / "second")
    weights, configs = ([tmp_path / step / name for step in ("first", "second")] for name in FILES[1:])
    assert weights[0].read_bytes() == weights[1].read_bytes()
    first, second = (json.loads(path.read_text()) | {"modules_to_save": None} for path in configs)
    assert first == second, "PEFT adds the classifier to modules_to_save each time"


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_merging_is_refused_and_unloading_gives_the_base_model(placement: str) -> None:
    model, base = adapted_bert(placement=placement), bert().unload()
    for merge in (model.merge_adapter, model.merge_and_unload, next(iter(layers(model).values())).merge):
        with pytest.raises(ValueError, match="cannot be merged: its activation is not linear"):
            merge()
    plain = model.unload()
    assert repr(plain.bert) == repr(base.bert)
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(plain.eval().bert.pooler.dense.weight, base.bert.pooler.dense.weight)


def test_several_adapters() -> None:
    model = adapted(gpt2().unload())
    first = logits(model)
    model.add_adapter("second", BottleneckConfig(placement="parallel", reduction_factor=8))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    randomise(model, 0.2)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert not torch.equal(logits(model), first), "randomised too"
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, second)
    model.delete_adapter("second")
    assert all(list(layer.bottleneck_down) == ["default"] for layer in layers(model).values() if layer.bottleneck_down)
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), adapter_names=["default"])


def test_adapters_of_another_dtype_than_the_model() -> None:
    base = bert().unload().bfloat16()
    model = get_peft_model(base, BottleneckConfig(reduction_factor=4, task_type="SEQ_CLS"))
    assert {p.dtype for n, p in model.named_parameters() if "bottleneck_" in n} == {torch.float32}
    randomise(model)
    assert logits(model).dtype == torch.bfloat16


def test_layers_of_ones_own_choice() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    x = torch.randn(3, 6)
    for placement, width in (("houlsby", 4), ("parallel", 8)):
        model = adapted(Net(), target_modules=["two"], placement=placement, reduction_factor=2)
        layer = model.base_model.model.two
        assert layer.bottleneck_down["default"].weight.shape == (2, width)
        assert model(x).shape == (3, 4)
    with pytest.raises(ValueError, match="needs a linear layer, got Net"):
        adapted(nn.ModuleDict({"net": Net()}), target_modules=["net"])


def test_a_model_of_another_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="no transformer block that is recognised: pass target_modules"):
        adapted(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"layers.0 \(.*\) is not attention and an MLP"):
        adapted(EVERY["mixtral"].model().unload())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"non_linearity": "tanh"}, "non_linearity: expected one of relu, .* got 'tanh'"),
        ({"placement": "both"}, "placement: expected one of houlsby, pfeiffer, parallel, got 'both'"),
        ({"reduction_factor": 0}, "reduction_factor: expected a number above 0"),
        ({"dropout": 1.5}, "dropout: expected a probability"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BottleneckConfig(**options)


def test_it_is_a_method_of_peft() -> None:
    config = BottleneckConfig()
    assert str(config.peft_type.value) == "BOTTLENECK" and PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type] is type(config)
