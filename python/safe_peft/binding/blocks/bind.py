"""Finds the parts of a model and binds them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from ...distributed.wrappers import short_name, walk
from ..adapters import peft_kind
from ..class_swap import STATE, is_bound, original_type, swap_class
from .activations import KINDS, Activation
from .attention import Attention
from .base import Part
from .dropouts import Dropout
from .checkpointing import Entry, SafeEmbedding, SafeOwner, before_blocks, input_embeddings
from .mlps import Mlp
from .norms import Norm, reason
from .stack import Block, SafeBlock, stacks, transformer_blocks
from .trains import modules_in

PARTS = ("norms", "mlps", "attention", "dropouts")
"""The names that `bind(parts=...)` accepts."""
ANYWHERE: tuple[type[Part], ...] = (Norm, Dropout)
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
IN_BLOCKS: tuple[type[Part], ...] = (Mlp, Attention, Activation)
"""Recognised only inside blocks: elsewhere the layer after an activation may train as a whole, and nothing is saved."""


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Part]]:
    """Find every part that an op can compute: its path, the module and the `Part`.

    Args:
        model: bound or not.
    """
    inside, covered = _inside_blocks(model), set()
    for name, module in _outside_adapters(model):
        if id(module) in covered:
            continue
        part = module.__dict__.get(STATE)
        if not isinstance(part, Part):
            part = None if is_bound(module) else _recognise(module, id(module) in inside)
        if part is not None:
            covered |= {id(module._modules.get(child)) for child in part.covers}
            yield name, module, part


def unrecognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Find modules that look like such parts and compute something else: path, module and reason.

    Args:
        model: bound or not.
    """
    parts = list(parts_of(model))
    known = {id(module) for _, module, _ in parts}
    known |= {id(module._modules.get(child)) for _, module, part in parts for child in part.covers}
    inside = _inside_blocks(model)
    for name, module in _outside_adapters(model):
        if id(module) in known or module._modules:
            continue
        kind = original_type(module)
        if "norm" in kind.__name__.lower():
            yield name, module, reason(module)
        elif id(module) in inside and kind.__module__ in _ACTIVATIONS:
            yield name, module, f"computes none of {', '.join(KINDS)}"


def _recognise(module: nn.Module, in_block: bool) -> Part | None:
    kinds = (*ANYWHERE, *IN_BLOCKS) if in_block else ANYWHERE
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):  # independent of the caller's settings
        return next((part.watch(module) for kind in kinds if (part := kind.recognise(module)) is not None), None)


def _inside_blocks(model: nn.Module) -> set[int]:
    return {id(module) for block in transformer_blocks(model).values() for module in modules_in(block)}


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules except those inside an adapter layer, which has its own binding."""
    adapters: list[str] = []
    for name, module in walk(model):
        if any(name.startswith(f"{other}.") for other in adapters):
            continue
        if peft_kind(module) is not None:
            adapters.append(name)
        yield short_name(name), module


def bind_blocks(model: nn.Module, parts: Collection[str] = PARTS) -> tuple[list[nn.Module], set[str]]:
    """Bind every part and every block of a model that is not bound yet.

    Args:
        model: a model with adapters.
        parts: the kinds of parts to bind.

    Returns:
        The modules that were bound, for `restore_class`; and the set of names of the blocks to recompute. You may
        change this set at any time. Several bindings of one model share it.
    """
    own: list[nn.Module] = []
    for _, module, part in list(parts_of(model)):
        if part.stem in parts and not is_bound(module) and part.refusal(module) is None:
            swap_class(module, part.mixin, part)
            own.append(module)
    found = stacks(model)
    states = [block.__dict__.get(STATE) for stack in found for block in stack.values()]
    shared = next((state for state in states if isinstance(state, Block)), None)
    entry, names = (shared.entry, shared.recompute) if shared is not None else (Entry(), set())
    for stack in found:
        blocks = list(stack.values())
        for name, block in stack.items():
            if not is_bound(block):
                swap_class(block, SafeBlock, Block(name, entry, blocks, names))
                own.append(block)
    if shared is None:
        own += _bind_entry(model, entry, [block for stack in found for block in stack.values()])
    return own, names


def _bind_entry(model: nn.Module, entry: Entry, blocks: list[nn.Module]) -> Iterator[nn.Module]:
    """Bind the input embeddings and the models that call them, and yield the bound modules."""
    entry.before = before_blocks(model, blocks)
    known = set(map(id, entry.before))
    entry.after = [module for _, module in walk(model) if id(module) not in known]
    for embeddings, owners in input_embeddings(model).items():
        for module, mixin in [(embeddings, SafeEmbedding), *((owner, SafeOwner) for owner in owners)]:
            if not is_bound(module):
                swap_class(module, mixin, entry)
                yield module
