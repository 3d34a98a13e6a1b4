"""Keeps the accounts of a forward: who holds which storage, and what would have to freeze for it to go."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Dropped, Recorder, Save, storages

from ..binding.adapters import Adapter
from ..binding.blocks import transformer_blocks
from ..binding.blocks.checkpointing import is_made
from ..binding.code import observes
from ..distributed.wrappers import parameters_of, short_name, walk
from .attribution import Places
from .autograd_graph import Reach, latest_node
from .norms import Norms
from .retained import BlockFacts, RetainedTable, Saver, Storage

_CACHES = ("past_key_values", "past_key_value", "layer_past")


class _Note(NamedTuple):
    """Who was running when a tensor was saved, and the node that saved it."""

    module: str
    node: int
    part: str


class _Argument(NamedTuple):
    """A block's argument: its storage, and what a gradient that passes it comes from: leaves, or a node."""

    storage: tuple[int, int]
    alive: weakref.ref[Any]
    leaf: int
    node: int

    def key(self) -> tuple[int, int]:
        """Identity and size of its storage; once that is dead another may have its identity, but not its reference."""
        key, size = self.storage
        return (key, size) if self.alive() is not None else (-id(self.alive), size)


class Accounts:
    """Watches forwards, with values or without, and says what they retain.

    Args:
        model: whose forwards.
        adapters: those that train, in the order of their bits.
        recompute: names of blocks that run again in backward once they are frozen.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], recompute: Collection[str] = ()) -> None:
        self.adapters, self.recompute = adapters, recompute
        modules = [(short_name(name), module) for name, module in walk(model)]
        self.blocks = transformer_blocks(model)
        self.places = Places(modules, list(self.blocks))
        self.always = 1 << len(adapters)
        self.bits = {id(p): 1 << i for i, adapter in enumerate(adapters) for p in adapter.parameters()}
        self.stack: list[str] = []
        self.entered = False
        self.left: str | None = None  # a block that was left just now, having saved nothing
        self.saves = 0
        self.arguments: dict[str, list[_Argument]] = {}
        self.random: dict[str, bool] = {}
        self.thread = threading.get_ident()

    def table(self, recorder: Recorder, roots: Iterable[Any], known: Collection[int]) -> RetainedTable:
        """Return what is retained.

        Args:
            recorder: what was saved, with notes of `note`.
            roots: nodes from which backward starts.
            known: identities of storages that exist anyway.
        """
        saves, holds = recorder.saves(), [self._holds(block) for block in self.blocks.values()]
        places = {save.note.node: self.places.block(save.note.module) for save in saves}
        hidden = {node: holds[block] for node, block in places.items() if block >= 0}
        return self._table(saves, recorder.dropped(), Reach(roots, self._bit, hidden), known)

    def _bit(self, leaf: Tensor) -> int:
        return 0 if is_made(leaf) else self.bits.get(id(leaf), self.always)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forwards of the block."""
        hooks = [register_module_forward_pre_hook(self.enter), register_module_forward_hook(self._leave)]
        hooks += [
            block.register_forward_pre_hook(self._keep_arguments, with_kwargs=True) for block in self.blocks.values()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _path(self, module: nn.Module) -> str | None:
        """Hooks on all modules see those of others as well, in whatever thread."""
        return self.places.paths.get(id(module)) if threading.get_ident() == self.thread else None

    @observes
    def enter(self, module: nn.Module, args: Any = ()) -> None:
        """Note that a module's forward begins."""
        if (path := self._path(module)) is None:
            return
        self.stack.append(path)
        self.left = None
        if path in self.blocks:
            self.entered, self.saves = True, 0

    @observes
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if (path := self._path(module)) is None:
            return
        if path in self.stack:  # what died within has left nothing but its name
            del self.stack[len(self.stack) - 1 - self.stack[::-1].index(path) :]
        # Without gradients it is the first of the two passes of reentrant checkpointing, which saves afterwards.
        if path in self.blocks and self.saves == 0 and (path in self.recompute or not torch.is_grad_enabled()):
            self.left = path

    def _keep_arguments(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        clean = {name: value for name, value in kwargs.items() if name not in _CACHES}
        path = self._path(block)
        if path is not None:
            tensors = [leaf for leaf in tree_leaves((args, clean)) if isinstance(leaf, Tensor)]
            self.arguments[path] = [self._argument(tensor) for tensor in tensors]

    def _argument(self, tensor: Tensor) -> _Argument:
        """What is to be known of it, without keeping it or its graph alive."""
        node, leaf = -1, 0
        if tensor.grad_fn is not None:
            node = tensor.grad_fn._sequence_nr()
        elif tensor.requires_grad:
            leaf = self._bit(tensor)
        return _Argument(next(storages(tensor)), weakref.ref(tensor.untyped_storage()), leaf, node)

    def note(self) -> _Note:
        """Note who saves a tensor."""
        self.saves += 1
        if self.left is not None:
            return _Note(self.left, latest_node(), "recompute")
        path = self.stack[-1] if self.stack else ""
        return _Note(path, latest_node(), self.places.part(path, before_blocks=not self.entered))

    def note_draw(self) -> None:
        """Random numbers are drawn: real ones too, since some code compares the states of generators."""
        path = self.stack[-1] if self.stack else ""
        block = self.places.block(path)
        if block >= 0 and self.places.layer(path) is None:  # a frozen adapter's dropout is off
            self.random[list(self.blocks)[block]] = True
        with _disable_current_modes():
            torch.rand(1)

    # ---------------------------------------------------------------- what it comes to

    def _table(
        self, saves: Sequence[Save], dropped: Sequence[Dropped], reach: Reach, known: Collection[int]
    ) -> RetainedTable:
        sizes: dict[int, int] = {}
        savers: dict[int, list[Saver]] = {}
        norms = Norms(saves, dropped, reach, lambda note: self._saver(note, reach), self.always)
        own = list(norms.held())
        statistics = {key for key, _, saver in own if not saver.unless}  # saved for the norm, while a reader saved
        held = [(*pair, norms.of(i, save)) for i, save in enumerate(saves) for pair in storages(save.tensor)]
        for key, size, saver in [*(one for one in held if one[0] not in statistics), *own]:
            if key not in known:
                sizes[key] = size
                savers.setdefault(key, []).append(saver)
        inputs = {name: [argument.key() for argument in found] for name, found in self.arguments.items()}
        sizes |= {key: size for pairs in inputs.values() for key, size in pairs if key not in known}
        places = {key: index for index, key in enumerate(sizes)}
        kept = {name: [places[key] for key, _ in pairs if key in places] for name, pairs in inputs.items()}
        blocks = tuple(self._facts(name, block, reach, kept.get(name, [])) for name, block in self.blocks.items())
        found = tuple(Storage(size, tuple(dict.fromkeys(savers.get(key, ())))) for key, size in sizes.items())
        return RetainedTable(tuple(adapter.name for adapter in self.adapters), blocks, found)

    def _saver(self, note: _Note, reach: Reach) -> Saver:
        direct, everything = reach.direct.get(note.node, 0), reach.all.get(note.node, 0)
        if note.node not in reach.all and note.part == "recompute":  # no node leads to what holds a block's arguments
            everything = self._passes(note.module, reach)
        own = direct & ~self.always
        adapter = own.bit_length() - 1 if own else -1
        return Saver(note.module, note.part, self.places.block(note.module), direct or everything, adapter)

    def _facts(self, name: str, block: nn.Module, reach: Reach, inputs: list[int]) -> BlockFacts:
        holds, passes = self._holds(block), self._passes(name, reach)
        state = torch.get_rng_state().numel() if self.random.get(name) else 0
        return BlockFacts(name, holds, passes, tuple(dict.fromkeys(inputs)), state)

    def _passes(self, name: str, reach: Reach) -> int:
        found = 0
        for argument in self.arguments.get(name, ()):
            found |= argument.leaf | reach.all.get(argument.node, 0)
        return found

    def _holds(self, block: nn.Module) -> int:
        found = 0
        for parameter in parameters_of(block):
            found |= self._bit(parameter) if parameter.requires_grad else 0
        return found
