"""FSDP2 and tensor parallel: the processes that hold a model's shards, and its full tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .wrappers import parameters_of, walk


def is_initialized() -> bool:
    """Whether this process belongs to a training on several processes, possibly a single one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def fsdp_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules to which `fully_shard` was applied, the root first."""
    if not is_initialized():
        return
    from torch.distributed.fsdp import FSDPModule

    yield from (module for _, module in walk(model) if isinstance(module, FSDPModule))


def fsdp_groups(model: nn.Module) -> tuple[torch.distributed.ProcessGroup, ...]:
    """Return the groups that share the batch, one per dimension of FSDP2's mesh; () without FSDP2."""
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
    """Return the groups, one per dimension, of all meshes of the parameters: FSDP2's and tensor parallel's."""
    meshes = {id(mesh): mesh for p in parameters_of(model) if (mesh := getattr(p, "device_mesh", None)) is not None}
    return tuple(mesh.get_group(dim) for mesh in meshes.values() for dim in range(mesh.ndim))


def members(group: torch.distributed.ProcessGroup) -> frozenset[int]:
    """Return the global ranks of a group's processes."""
    return frozenset(torch.distributed.get_process_group_ranks(group))


def precision_policy(unit: nn.Module) -> Any:
    """Return the `MixedPrecisionPolicy` of a module to which `fully_shard` was applied."""
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    return state._mp_policy


def class_before(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a module had before `fully_shard`; without `fully_shard` its own class."""
    from torch.distributed.fsdp import FSDPModule

    if not issubclass(kind, FSDPModule):
        return kind
    before: type[nn.Module] = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
    return before


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Put FSDP2's shards, which the optimizer holds, back in place of full parameters left after backward."""
    for module in fsdp_modules(model):
        module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one; all processes must call this."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
