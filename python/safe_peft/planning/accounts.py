"""Records which module saves which tensor in a forward, and which adapters must freeze to free it."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Dropped, Recorder, Save, storages

from ..binding.adapters import Adapter, peft_kind
from ..binding.blocks import transformer_blocks
from ..binding.blocks.checkpointing import checkpoints, is_made
from ..binding.blocks.stack import hidden_of
from ..binding.code import observes
from ..distributed.wrappers import parameters_of, short_name, walk
from .autograd_graph import Norms, Reach, latest_node
from .retained import BlockFacts, RetainedTable, Saver, Storage

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_CACHES = ("past_key_values", "past_key_value", "layer_past")


class _Places:
    """The block and the part of every module of a model, by the module's path; the blocks are the lowest first."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], blocks: Iterable[str]) -> None:
        self.paths = {id(module): path for path, module in modules}
        self._kinds = dict(modules)
        self._blocks = {name: index for index, name in enumerate(blocks)}
        self._layers = {path for path, module in modules if peft_kind(module) is not None}

    def block(self, path: str) -> int:
        """Return the index of the block that contains a path, or -1."""
        return next((self._blocks[prefix] for prefix in _prefixes(path) if prefix in self._blocks), -1)

    def in_layer(self, path: str) -> bool:
        """Whether an adapter layer contains a path."""
        return any(prefix in self._layers for prefix in _prefixes(path))

    def part(self, path: str, *, before_blocks: bool) -> str:
        """Return one of `retained.PARTS` for the module that was running, before or after the first block ran."""
        module = self._kinds[path]
        if self.in_layer(path):
            return "LoRA dropout" if isinstance(module, nn.Dropout) else "LoRA inputs"
        if "norm" in type(module).__name__.lower():
            return "norms"
        if isinstance(module, nn.Dropout):
            return "dropout"
        block = next((prefix for prefix in _prefixes(path) if prefix in self._blocks), None)
        if block is None:
            return "embeddings" if before_blocks else "head and loss"
        if path == block:
            return "block"
        return "attention" if _ATTENTION.search(f"{path.removeprefix(block)} {type(module).__name__}") else "MLP"


def _prefixes(path: str) -> list[str]:
    """Return the path itself and the paths of the modules around it, innermost first."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


class _Note(NamedTuple):
    """The module that was running when a tensor was saved, the node that saved it, and the part."""

    module: str
    node: int
    part: str


class _Argument(NamedTuple):
    """A block's argument: its storage, and the source of a gradient that passes it: bits of a leaf, or a node."""

    storage: tuple[int, int]
    alive: weakref.ref[Any]
    leaf: int
    node: int

    def key(self) -> int:
        """Identity of its storage; a dead storage gets a unique negative one, because identities are reused."""
        return self.storage[0] if self.alive() is not None else -id(self.alive)


class _Later(NamedTuple):
    """Bytes that a call retains only when an adapter is frozen, with the call's note and the adapter's bit."""

    note: _Note
    bytes: int
    bit: int


class Accounts:
    """Observes forwards, with or without values, and returns a table of what they retain.

    All given adapters train; their order gives their bits. `recompute` has the names of blocks that run again in
    backward once they are frozen.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], recompute: Collection[str] = ()) -> None:
        self.adapters, self.recompute = adapters, recompute
        self.blocks = transformer_blocks(model)
        self.places = _Places([(short_name(name), module) for name, module in walk(model)], self.blocks)
        self.always = 1 << len(adapters)
        self.bits = {id(p): 1 << i for i, adapter in enumerate(adapters) for p in adapter.parameters()}
        self.layers: dict[int, list[tuple[int, Adapter]]] = {}  # by a layer's id, the bits and adapters in it
        for i, adapter in enumerate(adapters):
            self.layers.setdefault(id(adapter.layer), []).append((1 << i, adapter))
        self.later: list[_Later] = []
        self.stack: list[str] = []
        self.entered = False
        self.left: str | None = None  # a block that has just ended without a save
        self.saves = 0
        self.arguments: dict[str, list[_Argument]] = {}
        self.samples: dict[str, int] = {}  # by block, bytes of hidden states per sample
        self.random: set[str] = set()  # blocks that draw random numbers
        self.checkpointed: set[str] = set()  # blocks with checkpointing that is not reentrant
        self.thread = threading.get_ident()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the forwards inside the context."""
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
        """Return None for modules of other models and in other threads, because global hooks see these too."""
        return self.places.paths.get(id(module)) if threading.get_ident() == self.thread else None

    @observes
    def enter(self, module: nn.Module, args: Any = ()) -> None:
        """Record that a module's forward begins."""
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
        if isinstance(output, Tensor) and torch.is_grad_enabled():
            for bit, adapter in self.layers.get(id(module), ()):
                if size := adapter.bytes_once_frozen(output):
                    note = _Note(path, latest_node(), self.places.part(path, before_blocks=not self.entered))
                    self.later.append(_Later(note, size, bit))
        if path in self.stack:  # modules above it on the stack raised an error, so their end was not recorded
            del self.stack[len(self.stack) - 1 - self.stack[::-1].index(path) :]
        if path not in self.blocks:
            return
        # A forward without gradients is the first pass of reentrant checkpointing; the second pass saves.
        if self.saves == 0 and (path in self.recompute or not torch.is_grad_enabled()):
            self.left = path
        elif torch.is_grad_enabled() and (self.saves == 0 or checkpoints(module)):
            self.checkpointed.add(path)

    def _keep_arguments(self, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if (path := self._path(block)) is not None:
            clean = {name: value for name, value in kwargs.items() if name not in _CACHES}
            tensors = [leaf for leaf in tree_leaves((args, clean)) if isinstance(leaf, Tensor)]
            self.arguments[path] = [self._argument(tensor) for tensor in tensors]
            if (hidden := hidden_of(args, kwargs)) is not None:
                self.samples[path] = hidden[:1].numel() * hidden.element_size()

    def _argument(self, tensor: Tensor) -> _Argument:
        """Describe an argument without keeping it or its graph alive."""
        node, leaf = -1, 0
        if tensor.grad_fn is not None:
            node = tensor.grad_fn._sequence_nr()
        elif tensor.requires_grad:
            leaf = self._bit(tensor)
        return _Argument(next(storages(tensor)), weakref.ref(tensor.untyped_storage()), leaf, node)

    def note(self) -> _Note:
        """Return the note for a tensor that is saved now."""
        self.saves += 1
        if self.left is not None:
            return _Note(self.left, latest_node(), "recompute")
        path = self.stack[-1] if self.stack else ""
        return _Note(path, latest_node(), self.places.part(path, before_blocks=not self.entered))

    def note_draw(self) -> None:
        """Record that random numbers are drawn, and draw a real one, because some code compares generators' states."""
        path = self.stack[-1] if self.stack else ""
        block = self.places.block(path)
        if block >= 0 and not self.places.in_layer(path):  # a frozen adapter's dropout is off
            self.random.add(list(self.blocks)[block])
        with _disable_current_modes():
            torch.rand(1)

    # ---------------------------------------------------------------- the table

    def table(self, recorder: Recorder, roots: Iterable[Any], known: Collection[int]) -> RetainedTable:
        """Return the table of what is retained for a backward from `roots`, without the storages in `known`."""
        saves = recorder.saves()
        holds = [self._holds(block) for block in self.blocks.values()]
        places = {save.note.node: self.places.block(save.note.module) for save in saves}
        hidden = {node: holds[block] for node, block in places.items() if block >= 0}
        return self._table(saves, recorder.dropped(), Reach(roots, self._bit, hidden), known)

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
        for later in self.later:
            saver = self._saver(later.note, reach)
            needs = reach.all.get(later.note.node, 0) & ~later.bit
            sizes[-id(later)] = later.bytes
            savers[-id(later)] = [replace(saver, needs=needs, adapter=-1, unless=later.bit)]
        inputs = {name: {a.key(): a.storage[1] for a in found} for name, found in self.arguments.items()}
        holds = {name: self._holds(block) for name, block in self.blocks.items()}
        passes = {name: self._passes(name, reach) for name in self.blocks}
        for name in filter(self.checkpointed.__contains__, self.blocks):  # the same order in all processes
            saver = Saver(name, "block", self.places.block(name), holds[name] | passes[name])
            for key in inputs[name].keys() & savers.keys():  # the loss does not lead to the node that saved them
                savers[key] = [*(one for one in savers[key] if one.needs), saver]
        sizes |= {key: size for found in inputs.values() for key, size in found.items() if key not in known}
        places = {key: index for index, key in enumerate(sizes)}
        blocks = []
        for name in self.blocks:
            kept = tuple(places[key] for key in inputs.get(name, ()) if key in places)
            state = torch.get_rng_state().numel() if name in self.random else 0
            sample = self.samples.get(name, 0)
            blocks.append(BlockFacts(name, holds[name], passes[name], kept, state, sample))
        found = tuple(Storage(size, tuple(dict.fromkeys(savers.get(key, ())))) for key, size in sizes.items())
        return RetainedTable(tuple(adapter.name for adapter in self.adapters), tuple(blocks), found)

    def _saver(self, note: _Note, reach: Reach) -> Saver:
        direct, everything = reach.direct.get(note.node, 0), reach.all.get(note.node, 0)
        # No node leads to the object that holds a block's arguments.
        if note.node not in reach.all and note.part == "recompute":
            everything = self._passes(note.module, reach)
        own = direct & ~self.always
        adapter = own.bit_length() - 1 if own else -1
        return Saver(note.module, note.part, self.places.block(note.module), direct or everything, adapter)

    def _passes(self, name: str, reach: Reach) -> int:
        """Return the bits of the adapters for which a gradient passes through a block."""
        found = 0
        for argument in self.arguments.get(name, ()):
            found |= argument.leaf | reach.all.get(argument.node, 0)
        return found

    def _holds(self, block: nn.Module) -> int:
        """Return the bits of the adapters, or other parameters, that train inside a block."""
        found = 0
        for parameter in parameters_of(block):
            found |= self._bit(parameter) if parameter.requires_grad else 0
        return found

    def _bit(self, leaf: Tensor) -> int:
        return 0 if is_made(leaf) else self.bits.get(id(leaf), self.always)
