"""Wrong arguments of a bound model raise what stock PEFT raises; devices without values run as stock does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import family
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from safe_peft import bind


def model(p: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 8))
    return get_peft_model(base, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, lora_dropout=p)).train()  # type: ignore[arg-type]


def raised(call: Callable[[], Any]) -> tuple[type | None, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def set_weight(child: str, *shape: int) -> Callable[[Any], None]:
    return lambda layer: setattr(getattr(layer, child)["default"], "weight", nn.Parameter(torch.randn(*shape)))


BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "rank": (set_weight("lora_A", 5, 16), "differ in r: got 5 and 4"),
    "d_out": (set_weight("lora_B", 7, 4), "weight must have shape [7, 16], d_out of lora_B"),
    "d_in": (set_weight("lora_A", 4, 12), "weight must have shape [8, 12], d_out of lora_B by d_in of lora_A"),
    "vector": (set_weight("lora_A", 16), "lora_A must have shape"),
    "stack": (set_weight("lora_B", 2, 8, 4), "lora_B must have shape"),
    "scaling": (lambda layer: layer.scaling.update(default=None), ""),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("training", [False, True])
def test_a_broken_adapter_raises_as_in_peft_with_our_words(name: str, training: bool) -> None:
    broken = model(0.5 if training else 0.0).train(training)
    change, words = BROKEN[name]
    change(broken.base_model.model[0])
    stock, text = raised(lambda: broken(torch.ones(3, 16)))
    with bind(broken):
        ours, own_text = raised(lambda: broken(torch.ones(3, 16)))
    assert ours is stock is not None
    assert text in own_text and words in own_text


INPUTS: dict[str, Callable[[], Any]] = {
    "narrow": lambda: torch.ones(3, 15),
    "no columns": lambda: torch.ones(3, 0),
    "integers": lambda: torch.ones(3, 16, dtype=torch.long),
    "float64": lambda: torch.ones(3, 16).double(),
    "complex": lambda: torch.ones(3, 16).to(torch.complex64),
    "float8": lambda: torch.ones(3, 16).to(torch.float8_e4m3fn),
    "meta": lambda: torch.ones(3, 16, device="meta"),
    "sparse": lambda: torch.ones(3, 16).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 16), torch.ones(2, 16)]),
    "scalar": lambda: torch.tensor(1.0),
    "none": lambda: None,
    "list": lambda: [1.0] * 16,
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_wrong_input_of_a_layer(name: str, p: float) -> None:
    one = model(p)
    stock, _ = raised(lambda: one(INPUTS[name]()))
    with bind(one):
        assert raised(lambda: one(INPUTS[name]()))[0] is stock


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(
    ("of", "path"), [("llama", "mlp"), ("bert", "intermediate_act_fn"), ("mpnet", "attn"), ("t5", "DenseReluDense")]
)
def test_wrong_input_of_a_part(of: str, path: str, name: str) -> None:
    one = family(of).model()
    part = next(module for full, module in one.named_modules() if full.endswith(path))
    stock, _ = raised(lambda: part(INPUTS[name]()))
    with bind(one):
        assert raised(lambda: part(INPUTS[name]()))[0] is stock


class Stack(nn.Module):
    """Of every part that is bound wherever it stands."""

    def __init__(self) -> None:
        super().__init__()

        def parts() -> dict[str, nn.Module]:
            return {"linear": nn.Linear(16, 16), "act": nn.GELU(), "dropout": nn.Dropout(0.1)}

        self.layers = nn.ModuleList([nn.Sequential(OrderedDict(parts())) for _ in range(2)])
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("first", ["bound", "moved"])
def test_the_meta_device(first: str, training: bool, dtype: torch.dtype) -> None:
    one = get_peft_model(Stack(), LoraConfig(target_modules=["linear"], lora_dropout=0.1)).to(dtype)  # type: ignore[arg-type]
    if first == "bound":
        bind(one)
    one.to("meta")
    bind(one)
    out = one.train(training)(torch.ones(2, 5, 16, device="meta", dtype=dtype))
    out.sum().backward()
    assert out.device.type == "meta" and out.shape == (2, 5, 16) and out.dtype == dtype
    assert all(p.grad is not None for name, p in one.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-gated", "mpnet"])
def test_families_on_the_meta_device(name: str) -> None:
    one = family(name).model().to("meta")
    batch = {key: value.to("meta") for key, value in family(name).batch().items() if key != "attention_mask"}
    stock = raised(lambda: one(**batch).loss.backward())
    with bind(one):
        assert raised(lambda: one(**batch).loss.backward()) == stock
