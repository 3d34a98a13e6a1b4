"""The stack of transformer blocks: where the graph begins, and which frozen blocks run again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..adapters import LayerState, peft_kind
from ..adapters.base import adapter_parameters
from ..paths import short_name
from ..swap import STATE, Swapped, is_bound, is_transformed
from .entry import Entry
from .recompute import recompute


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's transformer blocks by their paths, lowest first; an encoder's before its decoder's.

    They are found by structure: the outermost `nn.ModuleList`s with an adapter layer in an element, or, in a model
    without adapters, with two or more elements.

    Args:
        model: with or without adapters, bound or not.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> list(transformer_blocks(nn.ModuleDict({"layers": nn.ModuleList([layer, layer])})))
        ['layers.0', 'layers.1']
    """
    return {name: block for stack in stacks(model) for name, block in stack.items()}


def stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the same, stack by stack."""
    adapted = {name for name, module in model.named_modules() if peft_kind(module) is not None}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{other}.") for other in found)
        if not isinstance(module, nn.ModuleList) or inside or not len(module):
            continue
        has_adapter = any(path.startswith(f"{name}.") for path in adapted)
        if has_adapter or (not adapted and len(module) > 1):
            found[name] = module
    return [
        {f"{short_name(name)}.{index}": block for index, block in enumerate(blocks)} for name, blocks in found.items()
    ]


class SafeBlock(Swapped):
    """A transformer block that builds a graph only where somebody needs it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own call, hooks and activation checkpointing included."""
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        state: Block = self.__dict__[STATE]
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or is_transformed():
            return super().__call__(*args, **kwargs)
        return state.run(self, super().__call__, args, kwargs)


@dataclass
class Block:
    """What binding keeps about one block.

    Args:
        name: its path in the model.
        entry: where the model's gradient may enter for nothing.
        is_lowest: it is the first of its stack.
        recompute: names of the blocks that are to run again in backward once they are frozen.
    """

    mixin = SafeBlock
    name: str
    entry: Entry
    is_lowest: bool
    recompute: set[str] = field(repr=False)

    def run(self, block: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block with a graph, without one, or with one that is made in backward."""
        if self.is_lowest:
            args, kwargs = _replace_hidden(args, kwargs, self._enter)
        passes = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs)))
        live = trains(block)
        if not live and not passes:
            with _without_checkpointing(block):
                return call(*args, **kwargs)
        if not live and self.name in self.recompute and not _checkpoints(block):
            return recompute(call, args, kwargs)
        if live and not passes and _checkpoints_reentrantly(block):
            # Reentrant checkpointing trains nothing, without a word, unless an input requires grad.
            args, kwargs = _replace_hidden(args, kwargs, lambda hidden: hidden.detach().requires_grad_())
        return call(*args, **kwargs)

    def _enter(self, hidden: Tensor) -> Tensor:
        return hidden.detach() if self.entry.is_artificial(hidden) else hidden


def _replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the block's hidden states: its first argument, whatever that is called."""
    if args:
        first = change(args[0]) if _is_float(args[0]) else args[0]
        return (first, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), None)
    if name is None or not _is_float(kwargs[name]):
        return args, kwargs
    return args, {**kwargs, name: change(kwargs[name])}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def trains(block: nn.Module) -> bool:
    """Whether anything in a block trains: requires_grad, less what the ledger has frozen and PEFT has thawed since."""
    live: list[nn.Parameter] = []
    frozen: set[int] = set()
    for module in _parts(block):
        live += (p for p in module._parameters.values() if p is not None and p.requires_grad)
        state = module.__dict__.get(STATE)
        for key in state.frozen if isinstance(state, LayerState) else ():
            frozen.update(map(id, adapter_parameters(module, key)))
    return any(id(parameter) not in frozen for parameter in live)


def _parts(block: nn.Module) -> Iterator[nn.Module]:
    """A block's modules, some perhaps twice: asked for in every call, where `modules()` takes several times as long."""
    rest = [block]
    while rest:
        module = rest.pop()
        yield module
        rest += (child for child in module._modules.values() if child is not None)


def graph_states(model: nn.Module) -> dict[str, str]:
    """Say for every transformer block of a model what a training forward builds of a graph in it.

    Args:
        model: bound or not.

    Returns:
        By the block's path, in a few words.
    """
    found, reached = {}, _trains_before_blocks(model)
    for name, block in transformer_blocks(model).items():
        state = block.__dict__.get(STATE)
        again = isinstance(state, Block) and name in state.recompute
        if trains(block):
            found[name], reached = "trains", True
        elif reached:
            found[name] = "frozen, runs again in backward" if again else "frozen, the gradient passes through"
        else:
            found[name] = "no graph: nothing in it or below it trains"
    return found


def _trains_before_blocks(model: nn.Module) -> bool:
    """Whether anything that a model registers before its first block trains: embeddings and prompts do."""
    first = next(iter(transformer_blocks(model).values()), None)
    inside = {id(parameter) for parameter in first.parameters()} if first is not None else set()
    for parameter in model.parameters():
        if id(parameter) in inside:
            return False
        if parameter.requires_grad:
            return True
    return False


def _checkpoints(block: nn.Module) -> bool:
    return bool(getattr(block, "gradient_checkpointing", False)) and block.training


def _checkpoints_reentrantly(block: nn.Module) -> bool:
    function = getattr(block, "_gradient_checkpointing_func", None)
    return _checkpoints(block) and getattr(function, "keywords", {}).get("use_reentrant", True) is not False


@contextmanager
def _without_checkpointing(block: nn.Module) -> Iterator[None]:
    """Nothing is differentiated, so nothing needs to be computed again: the checkpointing function just calls."""
    own, name = block.__dict__, "_gradient_checkpointing_func"
    if not _checkpoints(block) or name not in own:
        yield
        return
    before, own[name] = own[name], lambda function, *args, **_: function(*args)
    try:
        yield
    finally:
        own[name] = before
