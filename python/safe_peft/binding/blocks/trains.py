"""Checks whether anything in a module trains, and whether a hook on it needs a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules import module as global_hooks

from ..adapters import LayerState
from ..adapters.base import adapter_parameters
from ..class_swap import STATE, is_of_user


def trains(block: nn.Module) -> bool:
    """Whether a parameter in a block requires grad, except frozen adapters whose requires_grad PEFT has set again."""
    live: list[nn.Parameter] = []
    frozen: set[int] = set()
    for module in modules_in(block):
        live += (p for p in module._parameters.values() if p is not None and p.requires_grad)
        state = module.__dict__.get(STATE)
        for key in state.frozen if isinstance(state, LayerState) else ():
            frozen.update(map(id, adapter_parameters(module, key)))
    return any(id(parameter) not in frozen for parameter in live)


def modules_in(block: nn.Module) -> Iterator[nn.Module]:
    """Yield a block's modules, some perhaps twice. Every call uses this; `modules()` takes several times as long."""
    rest = [block]
    while rest:
        module = rest.pop()
        yield module
        rest += (child for child in module._modules.values() if child is not None)


def waits_for_gradient(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has a backward hook, or a global backward hook is registered."""
    if global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks:
        return True
    return any(module._backward_hooks or module._backward_pre_hooks for module in modules)


def may_ask_for_gradient(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has a forward hook, or a global one is registered, except hooks of some libraries.

    A forward hook can put a hook on the output, retain its gradient, or add something that trains. No module shows it.
    """
    everywhere = (global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks)
    own = (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks))
    kinds = itertools.chain(everywhere, own)
    return any(is_of_user(hook) for hooks in kinds for hook in hooks.values())
