"""Runs one training step on a copy of a model without values: what autograd holds, and how high memory goes.

Nothing is estimated by formulas: the model's own code, PEFT's and this package's make every decision as they do in
training, and every tensor that is saved is seen. So whatever architecture runs, its plan is right.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Save, record, storages

from ..adapters import Adapter, adapter_of
from ..binding import Binding, bind
from ..blocks import transformer_blocks
from ..code import observes
from ..errors import PlanError
from ..loss import Loss
from ..paths import parameters_of, short_name, walk
from .device import as_on
from .fakes import FakeModel, MaskAnswers, first_line, ordinary_positions
from .graph import Reach, latest_node
from .inputs import Inputs
from .live import LiveBytes
from .parts import Places
from .retained import BlockFacts, RetainedTable, Saver, Storage

_CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True)
class Trace:
    """What one step does to memory, in bytes.

    Args:
        table: what is retained between forward and backward.
        peak: the most that tensors made in the step occupy at a time, gradients included.
        parameters: parameters and buffers, and the scales of quantised weights.
        inputs: the batch.
        gradients: what trains, and so the gradients at the end of backward.
    """

    table: RetainedTable
    peak: int
    parameters: int
    inputs: int
    gradients: int

    @property
    def retained(self) -> int:
        """Bytes retained between forward and backward."""
        return sum(storage.bytes for storage in self.table.storages if storage.savers)

    def whole(self, optimizer_states: int) -> int:
        """Bytes at the peak of a step: what lies there from step to step, and what the step makes.

        Args:
            optimizer_states: numbers the optimizer keeps for one that trains.
        """
        return self.parameters + self.inputs + optimizer_states * self.gradients + self.peak


def trace(
    model: nn.Module,
    inputs: Inputs,
    *,
    frozen: Collection[str] = (),
    recompute: Collection[str] = (),
    fast: bool = True,
    keep_dropout: bool = False,
    device: str = "",
    loss: Loss | None = None,
) -> Trace:
    """Trace a step of a model that is neither run nor changed.

    Args:
        model: a PEFT model, bound or not, on any device, or the module of a `FakeModel`.
        inputs: the batch.
        frozen: names of adapters to freeze.
        recompute: names of blocks that run again in backward once they are frozen.
        fast: bind the copy; otherwise it is stock PEFT.
        keep_dropout: leave the dropout of frozen adapters on; stock PEFT always does.
        device: the kind of device the model will train on, "cpu" or "cuda"; "" for the one it is on.
        loss: computes the loss of the model and a batch; None: the model's own.

    Raises:
        PlanError: The model does not run without values.
        BindingError: It has nothing to bind.

    Example:
        >>> trace(model, inputs_for(model, 8, 128)).retained  # doctest: +SKIP
        23068672
    """
    fake = FakeModel(model, device)
    if not fake.module.training:
        fake.module.train()
    adapters = live_adapters(fake.module)
    if fast:
        bind(fake.module).recompute.update(recompute)
    for adapter in adapters:
        if adapter.name in frozen:
            adapter.freeze(keep_dropout=keep_dropout or not fast)
    step = _Step(fake, [adapter for adapter in adapters if adapter.name not in frozen], recompute if fast else ())
    try:
        return step.run(inputs, device, loss)
    except PlanError:
        raise
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__} does not run without values ({type(error).__name__}: {first_line(error)}); a plan "
            "needs a model whose shapes do not depend on its data, and a batch that fits it."
        ) from error


def live_adapters(model: nn.Module) -> list[Adapter]:
    """Return the adapters of a model that train, bound or not.

    Args:
        model: a PEFT model.
    """
    layers = {short_name(name): layer for name, layer in walk(model) if adapter_of(layer) is not None}
    return Binding(layers).live_adapters()


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


class _Step:
    """One forward and backward, watched."""

    def __init__(self, fake: FakeModel, adapters: list[Adapter], recompute: Collection[str]) -> None:
        self.fake, self.adapters, self.recompute = fake, adapters, recompute
        modules = [(short_name(name), module) for name, module in walk(fake.module)]
        self.blocks = transformer_blocks(fake.module)
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

    def run(self, inputs: Inputs, kind: str, loss_of: Loss | None) -> Trace:
        """Forward, account, backward."""
        module = self.fake.module
        device = parameters_of(module)[0].device
        positions = nullcontext() if "position_ids" in inputs.tensors else ordinary_positions()
        random = torch.random.fork_rng(devices=[])
        answers = MaskAnswers({call.rows for call in inputs.calls}, inputs.padded)
        with (
            self.fake.mode,
            answers,
            torch.enable_grad(),
            random,
            positions,
            _autocast(device, inputs),
            as_on(kind, device),
        ):
            arguments = [call.make(device) for call in inputs.calls]
            batch = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
            called = [module.get_submodule(call.source) for call in inputs.calls]
            existing = self.fake.tensors
            with LiveBytes([*existing, *batch], self._note_draw, fake=True) as live:
                known = {key for t in [*existing, *batch] for key, _ in storages(t)}
                loss, table = self._forward(partial(_loss, loss_of, called, arguments), known)
                if loss is not None:
                    loss.backward()
                peak = live.peak
        trained = sum(p.numel() * p.element_size() for p in parameters_of(module) if p.requires_grad)
        return Trace(table, peak, _size(existing), _size(batch), trained)

    def _forward(self, compute: Callable[[], Any], known: set[int]) -> tuple[Tensor | None, RetainedTable]:
        with self._watching():
            loss, saves = record(compute, self._note)
        if loss is not None and (not isinstance(loss, Tensor) or loss.numel() != 1):
            got = f"one of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise PlanError(f"loss: expected a tensor of one element, got {got}; return what backward is called on.")
        if loss is None or not loss.requires_grad:
            return None, self._table([], Reach([], self._bit), known)
        return loss, self._table(saves, Reach([loss.grad_fn], self._bit), known)

    def _bit(self, leaf: Tensor) -> int:
        return self.bits.get(id(leaf), self.always)

    # ---------------------------------------------------------------- what is watched while the forward runs

    @contextmanager
    def _watching(self) -> Iterator[None]:
        hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
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
    def _enter(self, module: nn.Module, args: Any) -> None:
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
        self.stack.pop()
        if path in self.blocks and path in self.recompute and self.saves == 0:
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

    def _note(self) -> _Note:
        self.saves += 1
        if self.left is not None:
            return _Note(self.left, latest_node(), "recompute")
        path = self.stack[-1] if self.stack else ""
        return _Note(path, latest_node(), self.places.part(path, before_blocks=not self.entered))

    def _note_draw(self) -> None:
        """Random numbers are drawn: real ones too, for whoever compares the states of generators."""
        path = self.stack[-1] if self.stack else ""
        block = self.places.block(path)
        if block >= 0 and self.places.layer(path) is None:  # a frozen adapter's dropout is off
            self.random[list(self.blocks)[block]] = True
        with _disable_current_modes():
            torch.rand(1)

    # ---------------------------------------------------------------- what it comes to

    def _table(self, saves: list[Save], reach: Reach, known: set[int]) -> RetainedTable:
        sizes: dict[int, int] = {}
        savers: dict[int, list[Saver]] = {}
        for save in saves:
            for key, size in storages(save.tensor):
                if key not in known:
                    sizes[key] = size
                    savers.setdefault(key, []).append(self._saver(save.note, reach))
        inputs = {name: [argument.key() for argument in found] for name, found in self.arguments.items()}
        sizes |= {key: size for pairs in inputs.values() for key, size in pairs if key not in known}
        places = {key: index for index, key in enumerate(sizes)}
        kept = {name: [places[key] for key, _ in pairs if key in places] for name, pairs in inputs.items()}
        blocks = tuple(self._facts(name, block, reach, kept.get(name, [])) for name, block in self.blocks.items())
        found = tuple(Storage(size, tuple(dict.fromkeys(savers.get(key, ())))) for key, size in sizes.items())
        return RetainedTable(tuple(adapter.name for adapter in self.adapters), blocks, found)

    def _saver(self, note: _Note, reach: Reach) -> Saver:
        direct, everything = reach.direct.get(note.node, 0), reach.all.get(note.node, 0)
        own = direct & ~self.always
        adapter = own.bit_length() - 1 if own else -1
        return Saver(note.module, note.part, self.places.block(note.module), direct or everything, adapter)

    def _facts(self, name: str, block: nn.Module, reach: Reach, inputs: list[int]) -> BlockFacts:
        holds = passes = 0
        for parameter in parameters_of(block):
            holds |= self._bit(parameter) if parameter.requires_grad else 0
        for argument in self.arguments.get(name, ()):
            passes |= argument.leaf | reach.all.get(argument.node, 0)
        state = torch.get_rng_state().numel() if self.random.get(name) else 0
        return BlockFacts(name, holds, passes, tuple(dict.fromkeys(inputs)), state)


def _autocast(device: torch.device, inputs: Inputs) -> AbstractContextManager[Any]:
    if not inputs.autocast:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, inputs.autocast))


def _loss(loss: Loss | None, called: list[nn.Module], arguments: list[dict[str, Any]]) -> Any:
    """The loss of a step, or, of one that calls several models, the sum of what each would differentiate."""
    if loss is not None:
        return loss(called[0], arguments[0])
    found = [_differentiated(module, batch) for module, batch in zip(called, arguments, strict=True)]
    losses = [one for one in found if one is not None and one.requires_grad]
    return sum(losses[1:], losses[0]) if losses else None


def _differentiated(model: nn.Module, batch: dict[str, Any]) -> Tensor | None:
    """What a training differentiates, and nothing else, so that the rest of the output is gone as it is there."""
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return leaves[0].float().sum() if leaves else None


def _size(tensors: Iterable[Tensor]) -> int:
    return sum({key: size for tensor in tensors for key, size in storages(tensor)}.values())
