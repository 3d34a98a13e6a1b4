"""Copies a model without its values: the tensors have a shape, a dtype and a storage, but no memory.

A model that is sharded by `fully_shard` is copied unsharded, in the dtypes that it computes in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import FakeCopyMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

from ..binding.adapters.base import TENSORS
from ..binding.blocks import parts_of
from ..binding.blocks.norms import INVERTS, Norm
from ..binding.class_swap import STATE, original_type
from ..distributed import fsdp
from ..distributed.wrappers import buffers_of, parameters_of, walk
from ..errors import PlanError, first_line

_ALL, _ANY = torch.ops.aten.all.default, torch.ops.aten.any.default
_FIND_PACKED = "find_packed_sequence_indices"
_ATTACHED = "_attached"
"""Attribute of a copied parameter: names of the attributes that were copied with it."""


class FakeModel:
    """A copy of a model on fake tensors. The model itself does not change, and may be on the meta device.

    Hooks and replaced forwards are copied, as by `copy.deepcopy`. Bindings and a freezer's hooks are not. The scales of
    quantised weights are copied from any attribute of a layer. `tensors` lists all tensors of the copy.

    Args:
        model: any module.
        kind: the kind of device that the plan is for; tensors on another kind of device are copied to the CPU.

    Raises:
        PlanError: The model cannot be copied.

    Example:
        >>> fake = FakeModel(nn.Linear(2, 3, device="meta"))
        >>> with fake.mode:
        ...     fake.module(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, model: nn.Module, kind: str = "") -> None:
        check_sharding(model)
        self.mode, self._kind = FakeTensorMode(), kind
        memo: dict[int, Any] = {}
        self._shapes: dict[int, Tensor] = {}
        self._whole = _gathered_dtypes(model)
        self.tensors: list[Tensor] = []
        parameters = parameters_of(model)
        tensors = [*parameters, *buffers_of(model), *(p.grad for p in parameters if p.grad is not None)]
        try:
            with self.mode:
                for tensor in tensors:
                    memo[id(tensor)] = self.copied(tensor)
                for parameter in parameters:
                    memo[id(parameter)].grad = None
            with _Copying(self), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _copy_units(model, memo)
                self.module: nn.Module = copy.deepcopy(model, memo)
                for parameter in parameters:
                    _attach(parameter, memo)
        except Exception as error:
            raise PlanError(
                f"{type(model).__name__} cannot be copied for a plan ({first_line(error)}); remove what was added to "
                "its modules, or make the plan before you add it."
            ) from error
        self.tensors += [*parameters_of(self.module), *buffers_of(self.module)]
        self._note_norms(model)

    def _note_norms(self, model: nn.Module) -> None:
        """Store on each copied norm whether it can retain its output: this depends on the values of its weights."""
        parameters = parameters_of(model)
        if any(isinstance(p.data, FakeTensor) or p.is_meta or fsdp.is_spread(p) for p in parameters):
            return  # no values, values that only all processes together have, or already stored
        norms = {id(module): part for _, module, part in parts_of(model) if isinstance(part, Norm)}
        for (_, original), (_, module) in zip(walk(model), walk(self.module), strict=True):
            if id(original) in norms:
                module.__dict__[INVERTS] = norms[id(original)].retains_output(original)

    def copied(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, inside `mode`; tensors that share memory share it in the copy too."""
        if id(tensor) in self._whole:
            empty = torch.empty(tensor.shape, dtype=self._whole[id(tensor)], device=self._device(tensor))
            return nn.Parameter(empty, requires_grad=tensor.requires_grad)
        if is_traceable_wrapper_subclass(tensor) or tensor.layout is not torch.strided:
            return self.mode.from_tensor(tensor, static_shapes=True)
        storage = tensor.untyped_storage()
        if storage._cdata not in self._shapes:
            count = storage.nbytes() // tensor.element_size()
            self._shapes[storage._cdata] = torch.empty(count, dtype=tensor.dtype, device=self._device(tensor))
        base = self._shapes[storage._cdata]
        base = base if base.dtype == tensor.dtype else base.view(tensor.dtype)
        fake = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake

    def _device(self, tensor: Tensor) -> torch.device:
        there = tensor.device.type != "meta" and tensor.device.type == (self._kind or tensor.device.type)
        return tensor.device if there else torch.device("cpu")


class _Copying(FakeCopyMode):
    """Copies tensors in other attributes than parameters and buffers, as in quantised layers."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__(model.mode)
        self.model = model

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or id(args[0]) in args[1]:
            return super().__torch_function__(func, types, args, kwargs)
        tensor, memo = args
        with self.model.mode:
            memo[id(tensor)] = self.model.copied(tensor)
        self.model.tensors.append(memo[id(tensor)])
        return memo[id(tensor)]


def _attach(parameter: nn.Parameter, memo: dict[int, Any]) -> None:
    """Copy the attributes that bitsandbytes sets on its parameters, because a fake tensor cannot have its class."""
    own = vars(parameter)
    known = type(parameter) in TENSORS or is_traceable_wrapper_subclass(parameter)
    names = own.get(_ATTACHED, () if known else tuple(own))
    if names:
        copied = {name: copy.deepcopy(own[name], memo) for name in names}
        memo[id(parameter)].__dict__.update(copied, **{_ATTACHED: names})


# ---------------------------------------------------------------- models that are sharded by FSDP2


def check_sharding(model: nn.Module) -> None:
    """Raise a PlanError if parameters are distributed over processes by anything other than FSDP2."""
    gathered = [fsdp.members(group) for group in fsdp.fsdp_groups(model)]
    if any(fsdp.members(group) not in gathered for group in fsdp.mesh_groups(model)):
        raise PlanError(
            "tensor parallelism: each process computes a part of a layer, and a plan is for whole layers; "
            'use freeze_by="adapters" and no memory_budget'
        )


def _gathered_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """Return, by the id of a shard, the dtype of the parameter that FSDP2 gathers for a forward."""
    found: dict[int, torch.dtype] = {}
    for unit in fsdp.fsdp_modules(model):  # the root first, so that the innermost unit of a parameter decides
        policy = fsdp.precision_policy(unit)
        for parameter in parameters_of(unit):
            if fsdp.is_spread(parameter):
                floating = parameter.is_floating_point() and policy.param_dtype is not None
                found[id(parameter)] = policy.param_dtype if floating else parameter.dtype
    return found


def _copy_units(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of FSDP2's units into deepcopy's memo, which has the parameters: units refuse to be copied.

    A copy is the unit before `fully_shard`, with the casts of the unit's precision policy but without its gathers.
    """
    units = list(fsdp.fsdp_modules(model))
    for unit in units:
        kind = fsdp.class_before(original_type(unit))
        memo[id(unit)] = kind.__new__(kind)
    for unit in units:
        twin: nn.Module = memo[id(unit)]
        twin.__dict__.update(copy.deepcopy(_own_attributes(unit), memo))
        policy = fsdp.precision_policy(unit)
        inputs = policy.param_dtype if policy.cast_forward_inputs else None
        twin.register_forward_pre_hook(partial(_cast_inputs, inputs), prepend=True, with_kwargs=True)
        if policy.output_dtype is not None:
            twin.register_forward_hook(partial(_cast_output, policy.output_dtype))


def _own_attributes(unit: nn.Module) -> dict[str, Any]:
    """Return a unit's attributes without those that binding and FSDP2 have added."""
    kept = {k: v for k, v in unit.__dict__.items() if k != STATE and not k.startswith("__composable_api")}
    for name in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = kept[name]
        modules = {key: getattr(hook, "__module__", None) or "" for key, hook in hooks.items()}
        own = ((key, hook) for key, hook in hooks.items() if not modules[key].startswith("torch.distributed."))
        kept[name] = type(hooks)(own)
    return kept


def _cast_inputs(dtype: torch.dtype | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args, kwargs) if dtype is None else _cast(dtype, (args, kwargs))


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(dtype, output)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)


# ---------------------------------------------------------------- answers that transformers reads from values


@contextmanager
def ordinary_positions() -> Iterator[None]:
    """Let transformers treat a fake batch as not packed, which is the usual case.

    transformers detects packed sequences from the values of `position_ids`, and builds a mask if there are no values.
    Nothing changes for real tensors, in any thread.
    """
    original = getattr(masking_utils, _FIND_PACKED, None)
    if original is None:
        yield
        return

    def find(position_ids: Tensor) -> Tensor | None:
        return None if isinstance(position_ids, FakeTensor) else original(position_ids)

    setattr(masking_utils, _FIND_PACKED, find)
    try:
        yield
    finally:
        setattr(masking_utils, _FIND_PACKED, original)


class MaskAnswers(TorchDispatchMode):
    """Gives transformers 4 the answer whether a mask [samples, tokens] is all ones, and whether a token is padding.

    Transformers 5 does not read these values from fake tensors. Any other read of a value is still an error.

    Args:
        rows: the numbers of samples of a step's batches.
        padded: whether a token is padding.
    """

    def __init__(self, rows: Collection[int], padded: bool) -> None:
        super().__init__()
        self.rows, self.padded = rows, padded
        self._asked: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0] in self._asked:
            return self._asked[args[0]]
        out = func(*args, **(kwargs or {}))
        if func in (_ALL, _ANY) and args[0].dim() == 2 and args[0].shape[0] in self.rows:
            self._asked[out] = self.padded == (func is _ANY)
        return out
