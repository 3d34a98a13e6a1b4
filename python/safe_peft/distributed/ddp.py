"""DistributedDataParallel: its reducer waits for the parameters that trained when it was made, so it is made anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .wrappers import parameters_of, walk

distributed: Any = torch.distributed
"""Its bindings to C++ have no declared names."""


def running_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper whose forward runs now and calls a model, which knows nothing of it.

    A Trainer hands the inner model on, and accelerate may wrap it later. DDP shows torch.compile which wrapper runs.

    Args:
        model: what the wrapper, or a module inside it, holds.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    return wrapper if wrapper is not None and any(module is model for _, module in walk(wrapper)) else None


def refusal(ddp: DistributedDataParallel) -> str | None:
    """Why its reducer cannot be made anew, and what to do instead; None if it can."""
    if ddp.mixed_precision is not None:
        return "DDP's mixed_precision ties its reducer to copies of the parameters; use torch.autocast instead"
    if ddp._delay_all_reduce_params:
        return "delay_all_reduce_named_params takes parameters away from DDP's reducer; leave it out"
    if ddp._use_python_reducer:
        return 'torch._dynamo.config.optimize_ddp="python_reducer" puts hooks where no freezing reaches; leave it out'
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters_of(ddp)):
        return "an optimizer that steps within backward keeps its own state; use one that steps after it"
    return None


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Make DDP reduce the gradients of the parameters that train now, and of no others.

    What DDP's constructor and its `__setstate__` do, hooks included. Between two steps, or as a step's first forward
    begins: no backward may be under way. No process waits for another here; in the next forward but one they agree on
    the order of the buckets, as after the first one.

    Args:
        ddp: its parameters' requires_grad is the same in every process.
    """
    builtin = _builtin_hook(ddp)
    ddp._remove_autograd_hooks()
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    logger: Any = ddp.logger
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        logger._set_static_graph()
    for hook, state in ddp._comm_hooks:
        _forget_buckets(state)
        logger._set_comm_hook_name(hook.__qualname__)
        distributed._register_comm_hook(ddp.reducer, state, hook)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)
    if ddp._get_active_ddp_module() is ddp and torch.is_grad_enabled() and ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()  # as DDP's forward has had the old reducer do


def _builtin_hook(ddp: DistributedDataParallel) -> object | None:
    """The communication hook in C++, which DDP keeps no note of but in its log."""
    name = ddp._get_ddp_logging_data().get("comm_hook", "")
    kinds = distributed.BuiltinCommHookType.__members__.values()
    return next((kind for kind in kinds if str(kind) == name), None)


def _forget_buckets(state: object) -> None:
    """PowerSGD keeps its errors and factors by the bucket's number, and the buckets have other sizes now."""
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        getattr(state, name, {}).clear()
