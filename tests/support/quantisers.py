"""One linear layer in every kind of quantisation, and models whose layers are quantised.

bitsandbytes, torchao and HQQ are the real packages on their CPU backends. What needs a GPU to install is a stand-in
of the same interface: packed int4 weights with a scale a group, in plain torch, inside PEFT's own layer class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from families import family
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from tiny import randomise_adapters
from torch import Tensor, nn

GROUP = 16


class PackedLinear(nn.Module):
    """A stand-in for GPTQ's QuantLinear: two 4-bit numbers a byte; its backward dequantises again."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        groups = layer.weight.detach().unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1, keepdim=True) / 7
        codes = (torch.round(groups / scales) + 8).flatten(1).to(torch.uint8)
        self.register_buffer("qweight", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scales", scales)
        self.bias = layer.bias

    def dequantize_weight(self) -> Tensor:
        codes = torch.stack((self.qweight & 15, self.qweight >> 4), -1).flatten(1).to(self.scales.dtype) - 8
        return (codes.unflatten(1, (-1, GROUP)) * self.scales).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        out = _PackedMatmul.apply(x, self)
        return out if self.bias is None else out + self.bias.to(x.dtype)


class _PackedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantize_weight().T.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantize_weight().to(grad.dtype), None


class PackedAwq(PackedLinear):
    """The same, for PEFT to make an AWQ layer of."""


class PackedAqlm(PackedLinear):
    """The same, for AQLM, whose layer in PEFT adds in place."""


STAND_INS: dict[type[nn.Module], type[nn.Module]] = {
    PackedLinear: GPTQLoraLinear,
    PackedAwq: AwqLoraLinear,
    PackedAqlm: AqlmLoraLinear,
}


def bnb_4bit(layer: nn.Linear, compute_dtype: torch.dtype | None = None) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    new = Linear4bit(*sizes, bias, quant_type="nf4", compute_dtype=compute_dtype)
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def bnb_8bit(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
    new = Linear8bitLt(*sizes, bias, has_fp16_weights=False, threshold=6.0)
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def torchao(config: Callable[[], Any]) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(layer, config())
        return layer

    return quantise


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


TORCHAO = {"torchao-int8": int8, "torchao-int8-dynamic": int8_dynamic, "torchao-int4": int4}
_ASKED = inspect.signature(TorchaoLoraLinear.__init__).parameters["get_apply_tensor_subclass"]
TORCHAO_ASKED = TORCHAO if _ASKED.default is inspect.Parameter.empty else {}
"""Kinds of which PEFT up to 0.18 wants to know, from transformers, how to quantise again what it has merged."""


def hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options = BaseQuantizeConfig(nbits=4, group_size=GROUP)
    return HQQLinear(layer, options, compute_dtype=layer.weight.dtype, device="cpu")


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bnb-4bit": bnb_4bit,
    "bnb-8bit": bnb_8bit,
    **{name: torchao(config) for name, config in TORCHAO.items()},
    "hqq": hqq,
    "gptq-stand-in": PackedLinear,
    "awq-stand-in": PackedAwq,
    "aqlm-stand-in": PackedAqlm,
}


def with_lora(kind: str, model: nn.Module, targets: list[str] | str, **options: Any) -> PeftModel:
    """PEFT's model over one whose layers are quantised; with adapters that do something."""
    if kind in TORCHAO_ASKED:
        config = SimpleNamespace(get_apply_tensor_subclass=TORCHAO[kind])
        model.hf_quantizer = SimpleNamespace(quantization_config=config)  # type: ignore[assignment]
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind.startswith("bnb-4"), kind == "bnb-8bit"  # PEFT asks
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})
    lora._register_custom_module(STAND_INS)
    peft_model = get_peft_model(model, lora).train()
    randomise_adapters(peft_model)
    return peft_model


def quantised_layer(
    kind: str, dtype: torch.dtype = torch.float32, quantise: Callable[[nn.Linear], nn.Module] | None = None, **lora: Any
) -> nn.Module:
    """One LoRA layer over a quantised one, in a model of its own."""
    torch.manual_seed(0)
    base = (quantise or KINDS[kind])(nn.Linear(32, 48).to(dtype).requires_grad_(False))
    model = with_lora(kind, nn.Sequential(base), ["0"], **lora)
    layer: nn.Module = model.base_model.model[0]
    layer.owner = [model]  # type: ignore[assignment]  # in a list, which nn.Module does not look into
    return layer


def quantised_llama(kind: str, layers: int = 2, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    """A small Llama whose linear layers, the head's apart, are quantised, with LoRA on all of them."""
    llama = family("llama")
    torch.manual_seed(0)
    model = llama.make(layers, 0.0).to(dtype).requires_grad_(False)
    for block in model.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, KINDS[kind](child))
    return with_lora(kind, model, list(llama.targets), **lora)
