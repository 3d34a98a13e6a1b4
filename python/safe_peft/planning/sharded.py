"""Copies a model that is sharded by `fully_shard` for a plan: unsharded, and in the dtypes that it computes in."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..binding.class_swap import STATE, original_type
from ..distributed.fsdp import (
    class_before,
    fsdp_groups,
    fsdp_modules,
    is_spread,
    members,
    mesh_groups,
    precision_policy,
)
from ..distributed.wrappers import parameters_of
from ..errors import PlanError

_ENGINE = "torch.distributed."


def check_sharding(model: nn.Module) -> None:
    """Raise an error if parameters are distributed over processes by anything other than FSDP2.

    Raises:
        PlanError: The model uses tensor parallelism.
    """
    gathered = [members(group) for group in fsdp_groups(model)]
    if any(members(group) not in gathered for group in mesh_groups(model)):
        raise PlanError(
            "tensor parallelism: each process computes a part of a layer, and a plan is for whole layers; "
            'use freeze_by="adapters" and no memory_budget'
        )


def whole_dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """Return, by the id of a shard, the dtype of the parameter that FSDP2 gathers for a forward.

    Args:
        model: sharded or not.
    """
    found: dict[int, torch.dtype] = {}
    for unit in fsdp_modules(model):  # the root first, so that the innermost unit of a parameter decides
        policy = precision_policy(unit)
        for parameter in parameters_of(unit):
            if is_spread(parameter):
                floating = parameter.is_floating_point() and policy.param_dtype is not None
                found[id(parameter)] = policy.param_dtype if floating else parameter.dtype
    return found


def copy_units(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put copies of a model's FSDP2 units into deepcopy's memo: units cannot be copied, and their hooks gather.

    A copy is the unit before `fully_shard`, with the casts of the unit's precision policy.

    Args:
        model: sharded or not.
        memo: already contains the model's parameters.
    """
    units = list(fsdp_modules(model))
    for unit in units:
        kind = class_before(original_type(unit))
        memo[id(unit)] = kind.__new__(kind)
    for unit in units:
        twin: nn.Module = memo[id(unit)]
        twin.__dict__.update(copy.deepcopy(_own(unit), memo))
        policy = precision_policy(unit)
        inputs = policy.param_dtype if policy.cast_forward_inputs else None
        twin.register_forward_pre_hook(partial(_cast_inputs, inputs), prepend=True, with_kwargs=True)
        if policy.output_dtype is not None:
            twin.register_forward_hook(partial(_cast_output, policy.output_dtype))


def _own(unit: nn.Module) -> dict[str, Any]:
    """Return a unit's attributes without those that binding and FSDP2 have added."""
    kept = {k: v for k, v in unit.__dict__.items() if k != STATE and not k.startswith("__composable_api")}
    for name in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = kept[name].items()
        kept[name] = type(kept[name])((k, h) for k, h in hooks if not _module_of(h).startswith(_ENGINE))
    return kept


def _module_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or ""


def _cast_inputs(dtype: torch.dtype | None, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args, kwargs) if dtype is None else _cast(dtype, (args, kwargs))


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(dtype, output)


def _cast(dtype: torch.dtype, values: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)
