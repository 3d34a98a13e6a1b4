"""LoRA of single parameters, such as the weights of all experts in one tensor (`target_parameters`).

PEFT's code computes these layers: it replaces the parameter W by W + scaling · B A during a call. Stock PEFT retains
this changed weight, of the size of all experts' weights, also for frozen adapters. On the fast path, backward
recomputes it from W, A and B, which exist anyway, with PEFT's own code. The experts' input x is retained once, instead
of the rows that each expert selects from it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import cached, is_parametrized, register_parametrization

from safe_kernels.retention import Recorder

from ..class_swap import forbids_hooks, is_bound, is_transformed
from ..keep import keep, storage_of
from .base import FLOATS, TENSORS, active_keys, adapter_keys, register_adapter
from .lora import LoraAdapter
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
        return _entered(self, context) if fast and keys else context


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
    with _same_version(weight):
        register_parametrization(base, name, proxy, unsafe=True)
    try:
        with cached(), nullcontext() if hooks is None else hooks.around(proxy, layer.base_layer):
            yield
    finally:
        layer._remove_parametrizations()


@contextmanager
def _entered(layer: Any, context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter PEFT's context without a write to the parameter, which a block that runs again would refuse."""
    with ExitStack() as stack:
        with _same_version(layer.get_param()):
            stack.enter_context(context)
        yield


def _same_version(weight: Tensor) -> AbstractContextManager[Any]:
    """Return a context for PyTorch's parametrization: it sets the parameter to itself, which counts as a write."""
    return nullcontext() if weight.is_inference() else _unsafe_preserve_version_counter(weight)


def _others_save() -> bool:
    """Whether others decide about saved tensors: offloading, a ban, or a checkpoint, which retains no weight anyway."""
    if forbids_hooks():
        return True
    top = _top_hooks()
    return top is not None and not isinstance(getattr(top[0], "__self__", None), _Hooks | Recorder)


def _top_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


class _Hooks:
    """Hooks that replace a saved, changed weight by its recipe, and pass other tensors to the outer hooks."""

    def __init__(self, layer: Any, key: str, weight: Tensor) -> None:
        A = layer.lora_A[key].weight
        uncast = copy.copy(layer)
        uncast.get_param = lambda: A  # so the factors are aliases of B and A, in their dtype
        with torch.no_grad():
            factors = [factor.detach() for factor in uncast.get_delta_factors(key)[:2]]
        self._layer, self._parts = layer, [weight.detach(), *factors]
        self.made: list[tuple[Tensor, _Recipe]] = []
        """The changed weights of the call that is running, which keeps them alive."""
        self._input: Tensor | None = None
        self._version = 0
        self._gathers: list[weakref.ref[_Gather]] = []
        self._others: set[int | None] = set()
        """The storages that the graph retains anyway."""
        outer: tuple[Any, Any] = _top_hooks() or (_save, _saved)
        self._pack, self._unpack = outer

    @contextmanager
    def around(self, proxy: nn.Module, called: nn.Module) -> Iterator[None]:
        """Set the hooks for one call of a module whose weight the proxy changes."""
        proxy.register_forward_hook(self.note)
        handle = called.register_forward_pre_hook(self.begin)
        try:
            with saved_tensors_hooks(self.pack, self.unpack):
                yield
            self.settle()
        finally:
            handle.remove()
            self.made, self._parts, self._gathers, self._input = [], [], [], None  # the graph's nodes hold the hooks
            self._others = set()

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Record the call's input."""
        is_first = self._input is None  # the module may call itself, for a part of its input at a time
        if is_first and args and type(args[0]) in TENSORS and args[0].grad_fn is not None:
            self._input, self._version = args[0], args[0]._version

    def note(self, proxy: Any, args: Any, weight: Tensor) -> None:
        """Record a changed weight that PEFT's code has computed."""
        if torch.is_grad_enabled() and weight.is_contiguous():
            recipe = _Recipe(self._layer, keep(self._parts), proxy.scaling, weight._version)
            self.made.append((weight, recipe))

    def pack(self, tensor: Tensor) -> Any:
        for weight, recipe in self.made:
            if (part := recipe.part(tensor, weight)) is not None:
                return part
        indices = self._indices(tensor)
        if indices is None:
            self._others.add(storage_of(tensor))
            return self._pack(tensor)
        gather = _Gather(self._pack(tensor), tensor.nbytes, storage_of(tensor), indices)
        self._gathers.append(weakref.ref(gather))
        return gather

    def _indices(self, tensor: Tensor) -> Any:
        """Return the indices if a tensor is the call's input, indexed; None for any other tensor."""
        x, node = self._input, tensor.grad_fn
        if x is None or node is None or node.name() != "IndexBackward0" or tensor._version != 0:
            return None
        if node.next_functions[0] != (x.grad_fn, x.output_nr):
            return None
        try:
            return [None if index is None else _save(index) for index in node._saved_indices]  # type: ignore[attr-defined]
        except RuntimeError:  # written to since
            return None

    def settle(self) -> None:
        """Retain the call's input instead of the rows that experts select, if these rows are larger in total."""
        found = [gather for ref in self._gathers if (gather := ref()) is not None]
        live = [gather for gather in found if gather.storage not in self._others and gather.holds()]
        x, gathered = self._input, sum({gather.storage: gather.bytes for gather in live}.values())
        if x is not None and x._version == self._version and gathered > x.untyped_storage().nbytes():
            kept = keep([x])
            for gather in live:
                gather.packed, gather.kept = None, kept

    def unpack(self, packed: Any) -> Tensor:
        if type(packed) is _Part:
            return packed.make()
        if type(packed) is not _Gather:
            return self._unpack(packed)
        return self._unpack(packed.packed) if packed.kept is None else packed.make()


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
    """The recipe of a changed weight: W and PEFT's two factors, saved by a node of their own."""

    layer: ParamWrapper
    kept: Any
    scaling: float
    version: int

    def part(self, tensor: Tensor, weight: Tensor) -> _Part | None:
        """Return the recipe of a tensor that is a part of the changed weight; None for any other tensor."""
        if type(tensor) not in TENSORS or tensor.dtype != weight.dtype or tensor.numel() == 0:
            return None
        if storage_of(tensor) != storage_of(weight) or tensor._version != self.version:
            return None
        start, size = tensor.storage_offset() - weight.storage_offset(), weight[0].numel()
        end = start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        first, behind = int(start // size), int(end // size + 1)
        return _Part(self, first, behind, tensor.shape, tensor.stride(), int(start - first * size))

    def experts(self, first: int, behind: int) -> Tensor:
        """Recompute the weights of some experts."""
        if self.layer.merged_adapters:
            raise RuntimeError(f"an adapter was merged into the base weight before backward. {_WRITTEN_TO}")
        W, left, right = (tensor[first:behind] for tensor in _kept(self.kept, _WRITTEN_TO))
        with torch.no_grad():
            return _Proxy(left.to(W.dtype), right.to(W.dtype), self.scaling).forward(W)


def _kept(kept: Callable[[], tuple[Tensor, ...]], words: str) -> tuple[Tensor, ...]:
    """Return the kept tensors; if one was written to, `words` explain the fix."""
    try:
        return kept()
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise RuntimeError(f"{error} {words}") from error


_WRITTEN_TO = (
    "A bound layer with `target_parameters` makes its weight again in backward, from the base weight, lora_A and "
    "lora_B. Change these after backward, or use the layer without the binding (Binding.detach())."
)
_INPUT_WRITTEN_TO = (
    "A bound layer with `target_parameters` keeps its input instead of the rows that experts select from it. Write to "
    "a clone of the input (x = x + experts(x), not x += experts(x)), or use the layer without the binding "
    "(Binding.detach())."
)


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Gather:
    """Replaces, in the graph, rows of the call's input that were selected for experts."""

    packed: Any
    bytes: int
    storage: int | None
    indices: Sequence[tuple[Tensor, int] | None]
    kept: Any = None

    def holds(self) -> bool:
        """Whether the indices have not been written to."""
        return all(index is None or index[0]._version == index[1] for index in self.indices)

    def make(self) -> Tensor:
        (x,) = _kept(self.kept, _INPUT_WRITTEN_TO)
        return x.detach()[tuple(slice(None) if index is None else _saved(index) for index in self.indices)]


@dataclass(eq=False, slots=True)
class _Part:
    """Replaces, in the graph, a part of a changed weight: one expert's matrix, or all."""

    recipe: _Recipe
    first: int
    behind: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        return self.recipe.experts(self.first, self.behind).as_strided(self.shape, self.stride, self.offset)
