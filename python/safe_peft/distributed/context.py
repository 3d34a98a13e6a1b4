"""The engine that trains one model on several processes: process groups, agreement, and engines that cannot adapt."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import BindingError
from . import ddp, fsdp
from .fsdp import is_initialized
from .wrappers import parameters_of, walk

REPLICA = (
    "nn.DataParallel copies the model for every call and loses the state of layers; start one process per device "
    "instead, with torchrun or accelerate launch"
)
MARKS = 1 << 20  # a mark's square, summed over thousands of processes, is exact in float64


class DistributedContext:
    """DDP, FSDP2, or neither: each process has a part of the batch, and all must make the same decisions.

    Args:
        model: the model without wrappers.
        outer: the model with all known wrappers.
        group: the processes that share the batch; None finds them: DDP's group, FSDP2's mesh, or all processes. Those
            that share the layers by tensor parallel decide with them.
    """

    def __init__(self, model: nn.Module, outer: nn.Module, group: ProcessGroup | None = None) -> None:
        self._model, self._outer, self._group = model, outer, group
        self._ddp = _ddp_among(outer)
        self._seen = self._stale = False

    def check(self, optimizer: object) -> None:
        """Raise if the engine, which may have wrapped the optimizer, needs parameters that never stop training."""
        reason = _refusal(self._model, self._outer, optimizer) or (self._ddp and ddp.refusal(self._ddp))
        if reason:
            raise BindingError(f"{reason}.")

    def forward_begins(self, module: nn.Module) -> None:
        """Find DDP's wrapper when a forward of a module begins: it may be newer than the freezer, or unknown to it.

        Raise if the wrapper, or `nn.DataParallel`, needs parameters that never stop training.
        """
        if getattr(module, "_is_replica", False):
            raise BindingError(f"{REPLICA}.")
        self._seen = True
        if self._ddp is None and is_initialized() and (wrapper := ddp.running_ddp(self._model)) is not None:
            if reason := ddp.refusal(wrapper):
                raise BindingError(f"{reason}.")
            self._ddp = wrapper
            if self._stale:
                self.parameters_changed()

    @property
    def waits(self) -> bool:
        """Whether parameters have changed before the first forward, which may show a wrapper that must adapt."""
        return self._stale and not self._seen

    @property
    def alone(self) -> bool:
        """Whether there is no other process to agree with."""
        return not self.groups()

    @property
    def process(self) -> int:
        """Rank of this process."""
        return torch.distributed.get_rank() if is_initialized() else 0

    def groups(self) -> tuple[ProcessGroup, ...]:
        """Return the groups to reduce over, one after the other; a mesh has one per dimension."""
        if not is_initialized() or torch.distributed.get_world_size() == 1:
            return ()
        every: Any = torch.distributed.group.WORLD
        if self._group is not None:
            found = [self._group]
        else:  # the group that shares the batch, by the engine
            found = [*fsdp.fsdp_groups(self._model)] or [self._ddp.process_group if self._ddp is not None else every]
        for group in fsdp.mesh_groups(self._model):
            if not any(fsdp.members(group) <= fsdp.members(other) for other in found):
                found.append(group)
        return tuple(group for group in found if torch.distributed.get_world_size(group) > 1)

    def check_step(self) -> None:
        """Raise inside DDP's `join()`, where processes may run out of batches at different steps."""
        if self._ddp is not None and self._ddp._join_config.enable:
            raise BindingError(
                "DDP's join(): a process without batches takes no part in scoring steps and in a new reducer; "
                "give every process the same number of batches, as DistributedSampler does."
            )

    def parameters_changed(self) -> None:
        """Adapt the engine after a change of requires_grad; call it between two steps, in every process."""
        if not is_initialized():
            return
        self._stale = self._ddp is None
        if self._ddp is not None:
            ddp.rebuild_reducer(self._ddp)

    def reshard(self) -> None:
        """Give the model the sharded parameters back, which the optimizer holds."""
        fsdp.reshard(self._model)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the same order in all of them."""
        found = [value]
        for group in self.groups():
            lists: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(lists, found, group=group)
            found = [item for items in lists for item in items]
        return found

    def require_same(self, facts: Mapping[str, Any] | Exception) -> None:
        """Raise in every process if one of them differs or has failed.

        The facts are values by name that must be the same, or the error that this process is about to raise.
        """
        if self.alone:
            return
        own = {"error": str(facts)} if isinstance(facts, Exception) else {"error": "", **facts}
        found = self.gather(own)
        for rank, other in enumerate(found):
            if other["error"] and not own["error"]:
                raise BindingError(f"process {rank} of {len(found)} cannot freeze adapters: {other['error']}")
        for name in own if not any(other["error"] for other in found) else ():
            if rank := next((rank for rank, other in enumerate(found) if other[name] != found[0][name]), 0):
                raise BindingError(
                    f"{name}: every process must have the same value, but 0 has {_short(found[0][name])} and {rank} "
                    f"has {_short(found[rank][name])}; start all of them with the same options on the same model."
                )

    def sum(self, values: Tensor, *, same: str, batch: str = "") -> tuple[Tensor, int, bool]:
        """Add float64 values over all processes in one all_reduce, which also checks that their states agree.

        Returns:
            The sums, the number of processes, and whether the text `batch` differs.

        Raises:
            BindingError: The text `same` differs; every process raises.
        """
        groups = self.groups()
        if not groups:
            return values, 1, False
        marks = [1 + zlib.crc32(text.encode()) % MARKS for text in (same, batch)]
        tail = [1.0, *(float(power) for mark in marks for power in (mark, mark * mark))]
        flat = torch.cat([values.flatten(), torch.tensor(tail, dtype=values.dtype, device=values.device)])
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        count, mark, square, batch_mark, batch_square = (int(value) for value in flat[-len(tail) :].tolist())
        if mark * mark != count * square:  # equal if and only if all marks are
            raise BindingError(
                "the processes have diverged: they are not at the same step with the same adapters frozen; resume "
                "all of them from one checkpoint, and call freezer.step() in all of them."
            )
        return flat[: -len(tail)].view_as(values), count, batch_mark * batch_mark != count * batch_square


def _ddp_among(outer: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(outer, DistributedDataParallel):
        inner = getattr(outer, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        outer = inner
    return outer


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---------------------------------------------------------------- engines that cannot adapt, each with an alternative


def _refusal(model: nn.Module, outer: nn.Module, optimizer: object) -> str | None:
    """Return the reason why adapters cannot be frozen under a model's engine; None if they can."""
    modules = [outer, *(module for _, module in walk(model))]
    is_zero3 = any(hasattr(parameter, "ds_id") for parameter in parameters_of(model))
    if is_zero3 or any(_is_deepspeed(item) for item in (outer, model, *_chain(optimizer))):
        return (
            "DeepSpeed keeps gradients and optimizer state in flat partitions, which would still change a frozen "
            "adapter; use DDP or FSDP2 (accelerate's fsdp_version=2)"
        )
    if isinstance(outer, DataParallel) and len(outer.device_ids) > 1:
        return REPLICA
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        return (
            "FSDP1 needs all parameters of a unit to train, or none; use FSDP2: fully_shard, or accelerate's "
            "fsdp_version=2"
        )
    return None


def _is_deepspeed(item: object) -> bool:
    return any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(item).__mro__)


def _chain(optimizer: object) -> list[object]:
    """Return an optimizer and the optimizers inside it."""
    found = [optimizer]
    while (inner := getattr(found[-1], "optimizer", None)) is not None and inner not in found:
        found.append(inner)
    return found
