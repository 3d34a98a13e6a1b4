"""Training on meshes of two dimensions: replicas of shards, and shards of layers."""

from __future__ import annotations

from typing import Any

from shares import LONG, events, shares
from tiny import adamw, bert, train
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from safe_peft import AdapterFreezer, SafeConfig
from safe_peft.distributed.fsdp import whole

STEPS = 32
OPTIONS = LONG | {"freeze_end": 24}


def split_mlps(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallel: every process computes a part of each MLP's features, its adapters' included."""
    plan = {
        "intermediate.dense.base_layer": ColwiseParallel(),
        "intermediate.dense.lora_B.default": ColwiseParallel(),
        "output.dense.base_layer": RowwiseParallel(),
        "output.dense.lora_A.default": RowwiseParallel(),
    }
    for block in model.base_model.model.bert.encoder.layer:
        parallelize_module(block, mesh, plan)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.base_model.model.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_on_mesh(
    rank: int, shape: tuple[int, int], kind: str, options: dict[str, Any], grouped: bool = False
) -> dict[str, Any]:
    """Train on a mesh whose second dimension shards parameters ("HSDP") or splits layers ("TP", "FSDP2 and TP").

    Args:
        rank: this process.
        shape: of the mesh.
        kind: one of the three.
        options: of SafeConfig.
        grouped: name the processes that share the batch.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("rows", "parts"))
    model = bert()
    if "TP" in kind:
        split_mlps(model, mesh["parts"])
    if kind != "TP":
        shard(model, mesh if kind == "HSDP" else mesh["rows"])
    optimizer = adamw(model)
    given = {"process_group": mesh["rows"].get_group()} if grouped else {}
    freezer = AdapterFreezer(model, optimizer, SafeConfig(**OPTIONS | options), **given)
    mine = (rank, shape[0] * shape[1]) if kind == "HSDP" else (mesh["rows"].get_local_rank(), shape[0])
    losses = train(model, optimizer, shares(STEPS, *mine), freezer)
    sums = [float(whole(parameter.detach()).double().abs().sum()) for parameter in model.parameters()]
    return {"losses": losses, "events": events(freezer), "digest": sums}
