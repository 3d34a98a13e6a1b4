"""PEFT's DoRA on a plain nn.Linear, with `safe_kernels.dora` for the whole layer.

The adapter's part of the output is the difference to the base layer's output. In a scoring step it is computed for the
sampled rows alone, without a subtraction, so that 16 bits do not round a small difference away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

import safe_kernels
from safe_kernels import AdapterStatistics
from safe_kernels.functional import draw_rng_state

from ..class_swap import autocasts, is_hooked
from ..code import own_methods, replaced
from .base import PARAMETERS

_METHODS = own_methods(
    (DoraLinearVariant, "forward"), (DoraLinearLayer, "forward"), (DoraLinearLayer, "get_weight_norm")
)


def refusal(layer: PeftLinear, key: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return why a call of a layer with a variant must take PEFT's own path; None if `forward` can compute it.

    Args:
        layer: the LoRA layer.
        key: the active adapter, which has a variant.
        args: the call's arguments; () to check only the layer.
        kwargs: the call's keyword arguments, without those that route a call.
    """
    variant = type(layer.lora_variant[key])
    if variant is not DoraLinearVariant:
        return f"LoRA variant {variant.__name__.removesuffix('LinearVariant')}"
    if (reason := replaced(_METHODS)) is not None:
        return reason
    modules: Any = layer._modules
    base, part = modules["base_layer"], modules["lora_magnitude_vector"]._modules[key]
    if type(base) is not nn.Linear or layer.fan_in_fan_out:
        return f"DoRA over {type(base).__name__}"
    if type(part) is not DoraLinearLayer or is_hooked(part) or is_hooked(base):
        return "DoRA with hooks on the base layer or on the magnitude, which the fast path would not run"
    weight: Any = base._parameters.get("weight")
    magnitude = part._parameters.get("weight")
    if not {type(weight), type(magnitude)} <= PARAMETERS:
        return "DoRA whose base weight or magnitude is not an ordinary parameter"
    if weight.requires_grad:
        return "DoRA over a base weight that trains"
    if len(args) > 1 or kwargs:
        return "the call passes arguments to the base layer"
    return _refuse_input(base, args[0]) if args else None


def _refuse_input(base: nn.Linear, x: Any) -> str | None:
    if not isinstance(x, Tensor):
        return None
    if x.dim() < 2:
        return "input is a vector"  # to which PEFT's DoRA adds a dimension
    dtypes = {tensor.dtype for tensor in (x, base.weight, base.bias) if tensor is not None}
    if autocasts(x):
        return "float64 under autocast, which does not cast it" if torch.float64 in dtypes else None
    return "input and base layer differ in dtype" if len(dtypes) > 1 else None


def magnitude_of(layer: Any, key: str, is_frozen: bool) -> Tensor:
    """Return an adapter's magnitude, without requires_grad if the adapter is frozen: PEFT may have set it again."""
    magnitude: Tensor = layer._modules["lora_magnitude_vector"]._modules[key].weight
    return magnitude.detach() if is_frozen and magnitude.requires_grad else magnitude


def forward(
    layer: Any,
    x: Tensor,
    adapter: tuple[Tensor, Tensor, Tensor, float],
    dropout_p: float,
    statistics: AdapterStatistics | None,
) -> Tensor:
    """Compute PEFT's forward of a layer with DoRA, and the sums that score the adapter.

    Args:
        layer: the LoRA layer.
        x: the layer's input.
        adapter: lora_A, lora_B, magnitude, scaling.
        dropout_p: the probability of the adapter's dropout module; PEFT's DoRA ignores it in evaluation.
        statistics: the sums to add to, if the call is scored.
    """
    base = layer.base_layer
    dropout_p = dropout_p if layer.training else 0.0
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if statistics is None:
        return safe_kernels.dora(x, base.weight, base.bias, *adapter, dropout_p=dropout_p)
    state = draw_rng_state(x.device) if dropout_p > 0.0 else None
    # The op itself, because it returns the norm too.
    out, norm = torch.ops.safe_kernels.dora(x, base.weight, base.bias, *adapter, dropout_p, state)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dropped = x if state is None else safe_kernels.dropout(x, dropout_p, rng_state=state)
        _score(statistics, base, adapter, x, dropped, norm)
    return out


def _score(
    statistics: AdapterStatistics,
    base: nn.Linear,
    adapter: tuple[Tensor, Tensor, Tensor, float],
    x: Tensor,
    dropped: Tensor,
    norm: Tensor,
) -> None:
    A, B, magnitude, scaling = adapter
    (rows, counts), (dropped, _) = statistics.take(x), statistics.take(dropped)
    rows, dropped = rows.to(x.dtype), dropped.to(x.dtype)
    weight, bias = base.weight.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype)
    scale = magnitude.double() / norm.double()
    change = (scale - 1) * F.linear(dropped, weight) + scale * scaling * F.linear(F.linear(dropped.to(A.dtype), A), B)
    features = F.linear(rows, weight, bias).double()
    statistics.add_features(features, features + change, counts)
