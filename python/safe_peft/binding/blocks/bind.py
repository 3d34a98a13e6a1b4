"""Finds the parts of a model and binds them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...distributed.wrappers import short_name, walk
from ..adapters import peft_kind
from ..class_swap import STATE, SwappedModule, is_bound, original_type, swap_class
from .attention import Attention
from .base import Part, SafePart
from .checkpointing import Entry, SafeEmbedding, SafeOwner, before_blocks, input_embeddings
from .mlps import KINDS, Activation, Dropout, Mlp
from .norms import Norm, reason
from .rotary import Rotary
from .stack import Block, SafeBlock, stacks, transformer_blocks
from .trains import modules_in

PARTS = ("norms", "mlps", "attention", "dropouts")
"""The names that `bind(parts=...)` accepts."""
ANYWHERE: tuple[type[Part], ...] = (Norm, Dropout)
IN_BLOCKS: tuple[type[Part], ...] = (Mlp, Attention, Activation, Rotary)
"""Recognised only inside blocks: elsewhere the layer after an activation may train as a whole, and nothing is saved."""
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, Part]]:
    """Yield every part of a model, bound or not, that an op can compute: its path, the module and the `Part`."""
    return ((name, module, part) for name, module, part, _ in _look_at(model) if part is not None)


def unrecognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the modules that look like such parts but compute something else: path, module and reason."""
    for name, module, part, in_block in _look_at(model):
        kind = original_type(module)
        if part is not None or module._modules:
            continue
        if "norm" in kind.__name__.lower():
            yield name, module, reason(module)
        elif in_block and kind.__module__ in _ACTIVATIONS:
            yield name, module, f"computes none of {', '.join(KINDS)}"


def _look_at(model: nn.Module) -> Iterator[tuple[str, nn.Module, Part | None, bool]]:
    """Yield path, module, part if recognised, and whether it is in a block, for all modules outside of bound modules.

    An adapter layer has its own binding, which covers the modules in it.
    """
    inside = {id(module) for block in transformer_blocks(model).values() for module in modules_in(block)}
    adapters, covered = list[str](), set[int]()
    for name, module in walk(model):
        if id(module) in covered or any(name.startswith(f"{other}.") for other in adapters):
            continue
        if peft_kind(module) is not None:
            adapters.append(name)
        part, in_block = module.__dict__.get(STATE), id(module) in inside
        if not isinstance(part, Part):
            kinds = (*ANYWHERE, *IN_BLOCKS) if in_block else ANYWHERE
            part = None if is_bound(module) else _recognise(module, kinds)
        if part is not None:
            covered |= {id(module._modules.get(child)) for child in part.covers}
        yield short_name(name), module, part, in_block


def _recognise(module: nn.Module, kinds: Sequence[type[Part]]) -> Part | None:
    # Independent of the caller's settings.
    with torch.device("cpu"), torch.autocast("cpu", enabled=False), unset_fake_temporarily():
        return next((part.watch(module) for kind in kinds if (part := kind.recognise(module)) is not None), None)


def bind_blocks(model: nn.Module, parts: Collection[str], own: list[nn.Module]) -> set[str]:
    """Bind every part of these kinds and every block of a model that is not bound yet.

    Args:
        model: without wrappers.
        parts: some of `PARTS`.
        own: gets the modules that were bound, one by one, for `restore_class`.

    Returns:
        The set of names of the blocks to recompute. You may change this set at any time. Several bindings of one model
        share it.
    """

    def swap(module: nn.Module, mixin: type[SwappedModule], state: object) -> None:
        if not is_bound(module):
            swap_class(module, mixin, state)
            own.append(module)

    for _, module, part in list(parts_of(model)):
        if part.stem in parts and part.refusal(module) is None:
            swap(module, SafePart, part)
    found = stacks(model)
    blocks = [block for stack in found for block in stack.values()]
    states = (block.__dict__.get(STATE) for block in blocks)
    shared = next((state for state in states if isinstance(state, Block)), None)
    entry, names = (shared.entry, shared.recompute) if shared is not None else (Entry(), set())
    for stack in found:
        for name, block in stack.items():
            swap(block, SafeBlock, Block(name, entry, list(stack.values()), names))
    if shared is None:
        entry.before = before_blocks(model, blocks)
        entry.after = [module for _, module in walk(model) if module not in entry.before]
        for embeddings, owners in input_embeddings(model).items():
            swap(embeddings, SafeEmbedding, entry)
            for owner in owners:
                swap(owner, SafeOwner, entry)
    return names
