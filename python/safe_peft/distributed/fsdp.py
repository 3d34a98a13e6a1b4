"""FSDP2 and tensor parallel: which processes hold the shards of a model, and its tensors put together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .wrappers import parameters_of, walk


def fsdp_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that `fully_shard` was called for, the root first."""
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (module for _, module in walk(model) if isinstance(module, FSDPModule))


def fsdp_groups(model: nn.Module) -> tuple[torch.distributed.ProcessGroup, ...]:
    """Return the groups, one a dimension of FSDP2's mesh, over which the batch is spread; () without FSDP2."""
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()  # type: ignore[operator]
        own = getattr(state, "_fsdp_param_group", None)
        for unit in getattr(state, "_fsdp_param_groups", [own] if own is not None else []):
            mesh = unit.mesh_info
            sharded = getattr(mesh, "shard_process_group", None)
            replicated = getattr(mesh, "replicate_process_group", None)
            return tuple(found for found in (sharded, replicated) if found is not None)
    return ()


def mesh_groups(model: nn.Module) -> tuple[torch.distributed.ProcessGroup, ...]:
    """Return the groups, one a dimension, of all meshes that parameters are spread over: FSDP2's, tensor parallel's."""
    meshes = {id(mesh): mesh for p in parameters_of(model) if (mesh := getattr(p, "device_mesh", None)) is not None}
    return tuple(mesh.get_group(dim) for mesh in meshes.values() for dim in range(mesh.ndim))


def members(group: torch.distributed.ProcessGroup) -> frozenset[int]:
    """Return the numbers, among all, of a group's processes."""
    return frozenset(torch.distributed.get_process_group_ranks(group))


def precision_policy(unit: nn.Module) -> Any:
    """Return the `MixedPrecisionPolicy` of a module that `fully_shard` was called for."""
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    return state._mp_policy


def class_before(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard` was called for it; its own, if it was not.

    Example:
        >>> class_before(nn.Linear)
        <class 'torch.nn.modules.linear.Linear'>
    """
    from torch.distributed.fsdp import FSDPModule

    if not issubclass(kind, FSDPModule):
        return kind
    before: type[nn.Module] = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
    return before


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards, which the optimizer holds, back where whole parameters were left after backward."""
    for module in fsdp_modules(model):
        module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is spread over processes in one piece; all of them have to ask.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
