"""The stack of transformer blocks: where the graph begins, and which frozen blocks are recomputed in backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed.wrappers import parameters_of, short_name, walk
from ..adapters import peft_kind
from ..class_swap import STATE, SwappedModule, forbids_hooks, is_bound, is_transformed, original_type
from .arguments import leaves, may_carry
from .checkpointing import Checkpointing, Entry, checkpoints
from .recompute import Run
from .trains import may_ask_for_gradient, modules_in, trains, waits_for_gradient


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's transformer blocks by their paths, lowest first; encoder blocks before decoder blocks.

    The blocks are found by structure: the outermost `nn.ModuleList`s with an adapter layer in an element, or, in a
    model without adapters, with two or more elements; and an `nn.Sequential` of blocks of one class with adapters.
    """
    return {name: block for stack in stacks(model) for name, block in stack.items()}


def stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """Return the transformer blocks by their paths, one dict per stack."""
    modules = list(walk(model))
    adapted = {name for name, module in modules if peft_kind(module) is not None}
    found: dict[str, nn.Module] = {}
    for name, module in modules:
        inside = any(name.startswith(f"{other}.") for other in found)
        if inside or not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
            continue
        has_adapter = any(path.startswith(f"{name}.") for path in adapted)
        if isinstance(module, nn.Sequential):
            is_stack = has_adapter and name not in adapted and _is_stack(module)
        else:
            is_stack = has_adapter or (not adapted and len(module) > 1)
        if is_stack:
            found[name] = module
    return [
        {f"{short_name(name)}.{key}": block for key, block in blocks._modules.items() if block is not None}
        for name, blocks in found.items()
    ]


def _is_stack(sequence: nn.Sequential) -> bool:
    """Whether an nn.Sequential, such as timm's, consists of blocks of one class, and is not a small network."""
    blocks = list(sequence)
    same = len({original_type(block) for block in blocks}) == 1
    return same and len(blocks) > 1 and all(block._modules and peft_kind(block) is None for block in blocks)


class SafeBlock(SwappedModule):
    """A transformer block that builds a graph only if a gradient needs it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_bound(self):
            return type(self).__call__(self, *args, **kwargs)
        state: Block = self.__dict__[STATE]
        if torch.compiler.is_compiling() or is_transformed():
            return super().__call__(*args, **kwargs)
        if not torch.is_grad_enabled():
            with nullcontext() if state.prefix is None else state.prefix.quiet(self):
                return super().__call__(*args, **kwargs)
        return state.run(self, super().__call__, args, kwargs)


@dataclass
class Block:
    """The state of one bound block.

    Args:
        name: the block's path in the model.
        entry: the model's leaves that only checkpointing set-ups need.
        stack: the blocks of its stack, lowest first.
        recompute: names of the blocks to recompute in backward once they are frozen.
        not_again: why the last call could not be recomputed exactly and retains its tensors; "" if it could.
        prefix: calls the blocks of the stack only for samples whose output is not known; None means always.
    """

    name: str
    entry: Entry
    stack: list[nn.Module] = field(repr=False)
    recompute: set[str] = field(repr=False)
    not_again: str = ""
    prefix: Any = field(default=None, repr=False)
    _checkpointing: Checkpointing = field(default_factory=Checkpointing, repr=False)

    def run(self, block: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block with a graph, without one, or with a graph whose tensors are recomputed in backward."""
        if block is self.stack[0]:
            args, kwargs = replace_hidden(args, kwargs, self._enter)
        run = partial(self._run, block, call)
        return run(args, kwargs) if self.prefix is None else self.prefix.run(self, block, run, args, kwargs)

    def _run(self, block: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = list(leaves((args, kwargs)))
        passes = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in given)
        may_pass = passes or any(map(may_carry, given))  # shared keys and values of a trained block, in a cache
        live = trains(block)
        again = not live and may_pass and self.name in self.recompute and not checkpoints(block)
        if again and not forbids_hooks():
            run = Run(call, block, self.name)
            output = run.first(args, kwargs)
            self.not_again = run.reason
            return output
        with self._checkpointing.around(block, needs_grad=live or may_pass):
            return call(*args, **kwargs)

    def _enter(self, hidden: Tensor) -> Tensor:
        return hidden.detach() if self.entry.is_artificial(hidden) and not self._is_waited_for() else hidden

    def _is_waited_for(self) -> bool:
        """Whether a hook needs a gradient up to and in the lowest block that trains, or outside of the blocks.

        If nothing trains, backward of the loss needs this leaf, as in stock PEFT.
        """
        for block in self.stack:
            modules = list(modules_in(block))
            if waits_for_gradient(modules) or may_ask_for_gradient(modules):
                return True
            if trains(block):
                return False
        after = self.entry.after
        parameters = (parameter for module in after for parameter in module._parameters.values())
        nothing_trains = not any(parameter is not None and parameter.requires_grad for parameter in parameters)
        return nothing_trains or waits_for_gradient(after) or may_ask_for_gradient(after)


def replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the hidden states in a block's arguments."""
    if (hidden := hidden_of(args, kwargs)) is None:
        return args, kwargs
    return ((change(hidden), *args[1:]), kwargs) if args else (args, {**kwargs, _hidden_name(kwargs): change(hidden)})


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states in a block's arguments, which are the first one under any name; None without any."""
    hidden = args[0] if args else kwargs.get(_hidden_name(kwargs))
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def _hidden_name(kwargs: dict[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "")


def graph_states(model: nn.Module) -> dict[str, str]:
    """Return in a few words, by every transformer block's path, whether a training forward builds a graph in it."""
    blocks = transformer_blocks(model)
    first = set(map(id, parameters_of(next(iter(blocks.values()))))) if blocks else set()
    # What a model registers before its first block, such as embeddings and prompts.
    before = itertools.takewhile(lambda parameter: id(parameter) not in first, parameters_of(model))
    found, reached = {}, any(parameter.requires_grad for parameter in before)
    for name, block in blocks.items():
        state = block.__dict__.get(STATE)
        asked = isinstance(state, Block) and name in state.recompute
        again = "frozen, recomputed in backward"
        if asked and checkpoints(block):
            again = "frozen, not recomputed: activation checkpointing is on"
        elif isinstance(state, Block) and state.not_again:
            again = f"frozen, not recomputed, because it would not be exact: {state.not_again}"
        if trains(block):
            found[name], reached = "trains", True
        elif reached:
            found[name] = again if asked else "frozen, the gradient passes through"
        else:
            found[name] = "no graph: nothing in it or below it trains"
    return found
