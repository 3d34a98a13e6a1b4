"""PEFT's LoRA on convolutions, with `safe_kernels.lora_conv` for the whole layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from torch import Tensor, nn

import safe_kernels

from ..class_swap import STATE, autocasts, is_hooked, original_type, own_forward
from ..code import own_methods, replaced, watched
from .base import PARAMETERS, active_keys, dotted_name, register_adapter
from .lora import DROPOUTS, ROUTING, LoraAdapter, as_peft, refuse_adapter, refuse_state, refuse_tensor
from .observed import ObservedLayer
from .without_kernel import BaseRunsApart

_CONVS: dict[type, type[nn.Module]] = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, Conv3d: nn.Conv3d}


def _called(layer: type, conv: type) -> tuple[tuple[type, str], ...]:
    own = ((layer, "forward"), (layer, "__call__"), (layer, "_cast_input_dtype"))
    return (*own, (conv, "forward"), (conv, "_conv_forward"), *((kind, "forward") for kind in DROPOUTS))


_METHODS = {layer: own_methods(*_called(layer, conv)) for layer, conv in _CONVS.items()}


def refusal(layer: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return why a call must take PEFT's own path, in a few words; None if the op can compute it.

    Every forward calls this function, so it reads only types and flags. Without `args`, only the layer is checked.
    """
    keys = active_keys(layer, layer._modules["lora_A"]._modules)
    if (reason := refuse_state(layer, keys, kwargs)) is not None:
        return reason
    if len(args) > 1 or any(name not in ROUTING for name in kwargs or ()):
        return "the call passes arguments to the base layer"
    if len(keys) > 1:
        return "several adapters are active on a convolution"
    if keys[0] in layer.lora_variant:
        return "DoRA on a convolution"
    if (reason := replaced(_METHODS[original_type(layer)])) is not None:
        return reason
    if watched():
        return "hooks on the calls of all modules, lora_A and lora_B among them"
    conv = _CONVS[original_type(layer)]
    return (
        refuse_adapter(layer, keys[0], conv)
        or _refuse_base(layer, keys[0], conv)
        or (_refuse_input(layer, keys[0], args[0]) if args else None)
    )


def _refuse_base(layer: Any, key: str, conv: type[nn.Module]) -> str | None:
    base = layer._modules["base_layer"]
    lora_A, lora_B = (layer._modules[name]._modules[key] for name in ("lora_A", "lora_B"))
    if type(base) is not conv:
        return f"base layer is a {type(base).__name__}"
    if is_hooked(base):
        return "hooks on the base layer, which the fast path would not run"
    if any("_conv_forward" in module.__dict__ for module in (base, lora_A, lora_B)):
        return "_conv_forward is replaced on the base layer, lora_A or lora_B (seamless tiling, for instance)"
    weight: Any = base._parameters.get("weight")
    bias = base._parameters.get("bias")
    if type(weight) not in PARAMETERS or not (bias is None or type(bias) in PARAMETERS) or "bias" in base.__dict__:
        return "weight or bias of the base layer is not an ordinary parameter"
    if weight.requires_grad:
        return "base weight trains"
    if base.padding_mode != "zeros" or isinstance(base.padding, str):
        return f"base layer pads with {base.padding_mode}, {base.padding}"
    is_pointwise = all(size == 1 for size in weight.shape[2:])
    if lora_A.stride != base.stride or lora_A.padding != base.padding or lora_A.padding_mode != "zeros":
        return "lora_A has other steps or padding than the base layer"
    if lora_A.dilation != base.dilation and not is_pointwise:
        return "lora_A has another dilation than the base layer"
    if lora_A.groups != 1 or lora_B.groups != base.groups:
        return "lora_A has groups, or lora_B other ones than the base layer"
    return None if _is_pointwise(lora_B) else "lora_B is no convolution with a kernel of size 1"


def _is_pointwise(conv: Any) -> bool:
    """Whether a convolution computes every position from the same position of its input."""
    wanted = zip((conv.kernel_size, conv.stride, conv.padding), (1, 1, 0), strict=True)
    return all(number == expected for numbers, expected in wanted for number in numbers)


def _refuse_input(layer: Any, key: str, x: Any) -> str | None:
    if (reason := refuse_tensor(x)) is not None:
        return reason
    base, lora_B = layer._modules["base_layer"], layer._modules["lora_B"]._modules[key]
    dtypes = {tensor.dtype for tensor in (x, base.weight, base.bias) if tensor is not None}
    if autocasts(x):
        if torch.float64 in {*dtypes, lora_B.weight.dtype}:
            return "float64 under autocast, which does not cast it"
        return None if layer.cast_input_dtype_enabled else "casting of inputs is switched off"
    if len(dtypes) > 1:
        return "input and base layer differ in dtype"
    if x.dtype != lora_B.weight.dtype:
        if not layer.cast_input_dtype_enabled:
            return "input and adapter differ in dtype, and casting is switched off"
        if lora_B.bias is not None:
            return "adapter has a bias (lora_bias) of another dtype than the input"
    return None


class SafeConv(BaseRunsApart):
    """PEFT's LoRA layer of a convolution; `safe_kernels.lora_conv` computes it if `refusal` returns None.

    The features are the channels of [..., C, *positions]; a row is a position.
    """

    @property
    def features_dim(self) -> int:  # type: ignore[override]
        return 1 - self.get_base_layer().weight.dim()  # type: ignore[operator]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.__dict__.get(STATE) is None:
            return own_forward(self, x, *args, **kwargs)
        if refusal(self, (x, *args), kwargs) is not None:
            return super().forward(x, *args, **kwargs)
        try:
            return self._watch(self._compute, (x,), {})
        except (TypeError, ValueError) as refused:
            return as_peft(super().forward, refused, x, *args, **kwargs)

    def _compute(self, x: Tensor) -> Tensor:
        own: Any = self
        (key,) = active_keys(own, own._modules["lora_A"]._modules)
        base, lora_A, lora_B = own.base_layer, own.lora_A[key], own.lora_B[key]
        dropout, scaling = own.lora_dropout[key], own.scaling[key]
        A, B, bias = lora_A.weight, lora_B.weight, base.bias
        if lora_B.bias is not None:
            bias = scaling * lora_B.bias if bias is None else bias + scaling * lora_B.bias
        if autocasts(x):  # the op computes the adapter in its dtype, which would be slower and take a wide copy of x
            dtype = torch.get_autocast_dtype(x.device.type)
            x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
        p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
        steps = base.stride, base.padding, base.dilation, base.groups
        return safe_kernels.lora_conv(x, base.weight, bias, A, B, scaling, *steps, dropout_p=p)

    def _sample_base(self, due: Any, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """On the fast path the base layer is not called, so its output needs another call, in scoring steps only."""
        if refusal(self, args, kwargs) is None:
            return super()._sample_base(due, call, args, kwargs)
        return ObservedLayer._sample_base(self, due, call, args, kwargs)


@register_adapter
class LoraConvAdapter(LoraAdapter):
    """One LoRA adapter of one convolution."""

    layer_type: ClassVar[type[nn.Module]] = Conv1d
    layer_names = (dotted_name(Conv2d), dotted_name(Conv3d))
    mixin: ClassVar[type[ObservedLayer]] = SafeConv
    refusal = staticmethod(refusal)

    @staticmethod
    def op(layer: nn.Module) -> str:
        return "lora_conv"

    def matrix_A(self, A: Tensor) -> Tensor:
        """Split lora_A, or lora_B, into one matrix per group of the base layer: each group of B reads one of A."""
        groups = self.layer.get_base_layer().groups
        return A.reshape(groups, A.shape[0] // groups, -1)

    def matrix_B(self, B: Tensor) -> Tensor:
        return self.matrix_A(B)
