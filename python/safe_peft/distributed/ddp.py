"""DistributedDataParallel: its reducer expects the initial trainable parameters, so a freeze event rebuilds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .wrappers import parameters_of, walk

distributed: Any = torch.distributed
"""Typed as Any, because its C++ bindings declare no names."""


def running_ddp(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper whose forward runs now and contains a model.

    A Trainer passes on only the inner model, and accelerate may wrap it later. DDP records the running wrapper for
    torch.compile.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    return wrapper if wrapper is not None and any(module is model for _, module in walk(wrapper)) else None


def refusal(ddp: DistributedDataParallel) -> str | None:
    """The reason why its reducer cannot be rebuilt, and the fix; None if it can be rebuilt."""
    if ddp.mixed_precision is not None:
        return "DDP's mixed_precision binds its reducer to copies of the parameters; use torch.autocast instead"
    if ddp._delay_all_reduce_params:
        return "delay_all_reduce_named_params removes parameters from DDP's reducer; do not use it"
    if ddp._use_python_reducer:
        return 'torch._dynamo.config.optimize_ddp="python_reducer" sets hooks that freezing cannot change; unset it'
    if any(hasattr(parameter, "_in_backward_optimizers") for parameter in parameters_of(ddp)):
        return "an optimizer that steps during backward keeps its own state; use one that steps after backward"
    return None


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Make DDP reduce the gradients of exactly the parameters that train now.

    It repeats the work of DDP's constructor and `__setstate__`, with the hooks. Call it between two steps, or at the
    start of a step's first forward: no backward may be running, and requires_grad is the same in every process. No
    process waits for another one here. In the second forward after this the processes agree on the order of the
    buckets, as in a new DDP.
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
        ddp.reducer.prepare_for_forward()  # DDP's forward has already done this for the old reducer


def _builtin_hook(ddp: DistributedDataParallel) -> object | None:
    """The communication hook in C++, which DDP records only in its log."""
    name = ddp._get_ddp_logging_data().get("comm_hook", "")
    kinds = distributed.BuiltinCommHookType.__members__.values()
    return next((kind for kind in kinds if str(kind) == name), None)


def _forget_buckets(state: object) -> None:
    """Clear PowerSGD's errors and factors: they are stored by bucket number, and the bucket sizes have changed."""
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        getattr(state, name, {}).clear()
