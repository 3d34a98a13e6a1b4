"""LoRA of single parameters, such as the weights of all experts in one tensor (`target_parameters`).

PEFT's code computes these layers: it replaces the parameter W by W + scaling · B A during a call. Stock PEFT retains
this changed weight, of the size of all experts' weights, also for frozen adapters. On the fast path backward makes it
again from W, A and B, which exist anyway, with PEFT's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import cached, is_parametrized, register_parametrization

from safe_kernels.retention import Recorder

from ..class_swap import is_bound, is_transformed
from ..keep import keep
from .base import active_keys, adapter_keys, register_adapter
from .lora import FLOATS, TENSORS, LoraAdapter
from .without_kernel import BaseRunsApart

_Proxy: Any = getattr(peft_layers, "_LoraFactorsProxy", None)
"""PEFT's W + scaling * left @ right; None in older versions."""
_ACTIVATE = ParamWrapper._activate_lora


class SafeParameter(BaseRunsApart):
    """Does not retain the changed weight, and computes it once per forward."""

    def _activate_lora(self, active_adapters: list[str]) -> AbstractContextManager[None]:
        """Override PEFT's method of this name, which changes the weight for one call."""
        fast = is_bound(self) and not torch.compiler.is_compiling() and not is_transformed()
        keys = active_keys(self, adapter_keys(self))
        if fast and keys and _retains(self) is None:
            return _changed(self, keys[0])
        context: AbstractContextManager[None] = super()._activate_lora(active_adapters)  # type: ignore[misc]
        return context


@register_adapter
class LoraParameterAdapter(LoraAdapter):
    """One LoRA adapter of one parameter, a matrix or a stack of them."""

    layer_type = ParamWrapper
    mixin = SafeParameter

    @staticmethod
    def refusal(layer: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> str:
        reason = _retains(layer)
        rest = f" and retains the changed weight: {reason}" if reason else "; backward makes the changed weight again"
        return f"lora.ParamWrapper (target_parameters) has no kernel{rest}"

    def matrix_A(self, A: Tensor) -> Tensor:
        """Return one matrix per expert."""
        return A.reshape(self.layer.num_experts, -1, A.shape[1])

    def matrix_B(self, B: Tensor) -> Tensor:
        """Return one matrix per expert, from PEFT's order, in which the experts are the last dimension."""
        return B.reshape(B.shape[0], -1, self.layer.num_experts).permute(2, 0, 1)

    def base_weight(self) -> Tensor:
        return self.layer.get_param().detach()


def _retains(layer: Any) -> str | None:
    """Return why a layer retains the changed weight, as stock PEFT does; None if it does not."""
    keys = active_keys(layer, adapter_keys(layer))
    if _Proxy is None:
        return "this version of PEFT adds the product of A and B as one tensor"
    if ParamWrapper._activate_lora is not _ACTIVATE:
        return "ParamWrapper._activate_lora is replaced"
    if layer.num_experts == 1:
        return "the parameter is one matrix"
    if len(keys) > 1:
        return "several adapters are active"
    if is_parametrized(layer.get_base_layer(), layer.parameter_name):
        return "the parameter has another parametrization"
    own = [holder[key].weight for key in keys for holder in (layer.lora_A, layer.lora_B)]
    if any(type(tensor) not in TENSORS or tensor.dtype not in FLOATS for tensor in [layer.get_param(), *own]):
        return "the parameter, lora_A or lora_B is not an ordinary parameter"
    return "lora_A and lora_B have different dtypes" if len({tensor.dtype for tensor in own}) > 1 else None


@contextmanager
def _changed(layer: Any, key: str) -> Iterator[None]:
    """Change the weight for one call, as PEFT's `_activate_lora` does for one adapter of several experts.

    PEFT registers its parametrization with PyTorch's checks, which compute the weight one time more.
    """
    base, name, weight = layer.get_base_layer(), layer.parameter_name, layer.get_param()
    proxy = _Proxy(*layer.get_delta_factors(key))
    hooks = _Hooks(layer, key, weight) if torch.is_grad_enabled() and not _others_save() else None
    if hooks is not None:
        proxy.register_forward_hook(hooks.note)
    register_parametrization(base, name, proxy, unsafe=True)
    try:
        with cached(), nullcontext() if hooks is None else saved_tensors_hooks(hooks.pack, hooks.unpack):
            yield
    finally:
        layer._remove_parametrizations()
        if hooks is not None:
            hooks.end()


def _others_save() -> bool:
    """Whether hooks of others get what autograd saves: offloading, or a checkpoint, which retains no weight anyway."""
    top = _top_hooks()
    return top is not None and not isinstance(getattr(top[0], "__self__", None), _Hooks | Recorder)


def _top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Hooks:
    """Hooks that replace a changed weight by its recipe, and leave other tensors to the hooks around them."""

    def __init__(self, layer: Any, key: str, weight: Tensor) -> None:
        A = layer.lora_A[key].weight
        uncast = copy.copy(layer)
        uncast.get_param = lambda: A  # so the factors are aliases of B and A, in their dtype
        with torch.no_grad():
            factors = [factor.detach() for factor in uncast.get_delta_factors(key)[:2]]
        self._layer, self._parts = layer, [weight.detach(), *factors]
        self.made: list[tuple[Tensor, _Recipe]] = []
        """The changed weights of the call that is running, which keeps them alive."""
        around: tuple[Any, Any] = _top_hooks() or (_save, _saved)
        self._pack, self._unpack = around

    def note(self, proxy: Any, args: Any, weight: Tensor) -> None:
        """Note a changed weight when PEFT's code has made it."""
        if torch.is_grad_enabled() and weight.is_contiguous():
            recipe = _Recipe(self._layer, keep(self._parts), proxy.scaling, weight._version)
            self.made.append((weight, recipe))

    def end(self) -> None:
        """Release the tensors when the call is over: the graph's nodes hold the hooks."""
        self.made, self._parts = [], []

    def pack(self, tensor: Tensor) -> Any:
        for weight, recipe in self.made:
            if (part := recipe.part(tensor, weight)) is not None:
                return part
        return self._pack(tensor)

    def unpack(self, packed: Any) -> Tensor:
        return packed.make() if type(packed) is _Part else self._unpack(packed)


def _save(tensor: Tensor) -> tuple[Tensor, int]:
    # Detached: an output saved by its own node would keep that node alive in a cycle.
    return tensor.detach(), tensor._version


def _saved(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # with hooks, autograd does not make this check
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {list(tensor.shape)} is at version {tensor._version}; expected version {version} instead."
        )
    return tensor


@dataclass(eq=False)
class _Recipe:
    """What a changed weight is made of: W and PEFT's two factors, saved by a node of their own."""

    layer: ParamWrapper
    kept: Any
    scaling: float
    version: int

    def part(self, tensor: Tensor, weight: Tensor) -> _Part | None:
        """Return the recipe of a tensor that is a part of the weight, as the weight was made; None for any other."""
        if type(tensor) not in TENSORS or tensor.dtype != weight.dtype or tensor.numel() == 0:
            return None
        if tensor.untyped_storage()._cdata != weight.untyped_storage()._cdata or tensor._version != self.version:
            return None
        start, size = tensor.storage_offset() - weight.storage_offset(), weight[0].numel()
        end = start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        first, behind = int(start // size), int(end // size + 1)
        return _Part(self, first, behind, tensor.shape, tensor.stride(), int(start - first * size))

    def experts(self, first: int, behind: int) -> Tensor:
        """Make the weights of some experts again."""
        if self.layer.merged_adapters:
            raise RuntimeError(f"an adapter was merged into the base weight before backward. {_WRITTEN_TO}")
        try:
            W, left, right = (tensor[first:behind] for tensor in self.kept.saved_tensors)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(f"{error} {_WRITTEN_TO}") from error
        with torch.no_grad():
            return _Proxy(left.to(W.dtype), right.to(W.dtype), self.scaling).forward(W)


_WRITTEN_TO = (
    "A bound layer with `target_parameters` makes its weight again in backward, from the base weight, lora_A and "
    "lora_B. Change these after backward, or use the layer without the binding (Binding.detach())."
)


@dataclass(eq=False, slots=True)
class _Part:
    """What the graph saves instead of a part of a changed weight: one expert's matrix, or all."""

    recipe: _Recipe
    first: int
    behind: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        return self.recipe.experts(self.first, self.behind).as_strided(self.shape, self.stride, self.offset)
