"""Recomputes a frozen block in backward, so that the block retains only its arguments.

The semantics are those of `torch.utils.checkpoint(use_reentrant=False)`: forward builds the graph, so gradients reach
everything that enters or leaves the block, by argument, hook or cache. That function itself is not used, because only
a finished call shows whether the block can run again exactly: a block that wrote into an argument must retain its
tensors. Also, the second call needs the cache before it was filled, and the modules' earlier mode and hooks.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from safe_kernels.inversion import fingerprint, leave_hooks

from ..adapters.base import TENSORS, unscored
from ..keep import keep, storage_of
from .arguments import Given, TensorsUsed, version
from .trains import may_ask_for_gradient, modules_in

WROTE = "it writes into its arguments in place, as a static cache does"
COUNTED = "it changes its own buffers or parameters in each call, as a batch norm does"
SUBCLASS = "autograd saves an argument as a plain tensor, and not as the subclass that it is"
_ENGINES = frozenset({"_parameters", "_buffers"})
"""FSDP replaces these before each call, so they are not part of a snapshot."""
_CONTAINERS = frozenset({list, dict, set, OrderedDict})
_HOOKS_ON_ALL: tuple[dict[int, Any], ...] = tuple(
    hooks
    for name, hooks in vars(global_hooks).items()
    if name.startswith("_global_") and name.endswith(("_hooks", "_called"))
)


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Handle:
    """The object that a graph node saves instead of a tensor."""

    index: int


class Run:
    """One call of a block that backward repeats; if an exact repetition is impossible, `reason` says why.

    In the second call, dropout draws the same numbers, and autocast and modules have the same state. If the block draws
    random numbers, the states of the generators are retained too (5,056 bytes on a CPU).
    """

    def __init__(self, call: Callable[..., Any], block: nn.Module | None = None, name: str = "the block") -> None:
        self._call, self._name = call, name
        modules = [] if block is None else list(modules_in(block))
        self._moment, self._is_hooked = Moment(modules), may_ask_for_gradient(modules)
        self._handles: list[weakref.ref[_Handle]] = []
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._saved: dict[int, Tensor] = {}
        self._kept: Any = None
        self._states = 0
        self._lock = threading.RLock()
        self.reason = ""

    def first(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make the call, and drop the tensors that its graph saved."""
        self._given = given = Given((tuple(args), dict(kwargs)), compares=self._is_hooked)
        self._device = next((tensor.device.type for tensor in given.tensors), "cpu")
        self._autocast = _autocast_now(self._device)
        before, (self._devices, states) = torch.get_rng_state(), get_device_states(*given.tensors)
        objects = given.in_objects
        unpack = self._unpack
        try:
            with saved_tensors_hooks(self._pack, unpack), TensorsUsed() if objects else nullcontext() as used:
                output = self._call(*args, **kwargs)
        except BaseException:
            self._saved = {}  # the nodes' hooks refer to this object, in a cycle that the collector cannot find
            raise
        with unset_fake_temporarily():  # the generator's state is real
            drew = bool(self._devices) or not torch.equal(before, torch.get_rng_state())
        self._settle([before, *states] if drew else [], {id(t) for t in objects if used and id(t) not in used.seen})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):  # `_kept` keeps the hooks around this call alive, as long as its graph exists
                leave_hooks(leaf, unpack)
        return output

    def _pack(self, tensor: Tensor) -> _Handle:
        handle = _Handle(len(self._handles))
        self._handles.append(weakref.ref(handle))
        self._shapes.append((tensor.shape, tensor.dtype))
        self._saved[handle.index] = tensor
        return handle

    def _settle(self, states: list[Tensor], unread: set[int]) -> None:
        """Drop the saved tensors if the call can be repeated, and retain what the repetition needs."""
        saved = {index: tensor for index, tensor in self._saved.items() if self._handles[index]() is not None}
        self._saved = {}
        if not saved:
            return
        self.reason = WROTE if self._given.was_written() else COUNTED if self._moment.was_written() else ""
        if not all(type(t) in TENSORS or is_traceable_wrapper_subclass(t) for t in self._given.tensors):
            self.reason = self.reason or SUBCLASS
        if self.reason:
            # Detached, because a node's own output would keep the node alive in a cycle.
            self._places = list(saved)
            self._kept = keep([tensor.detach() for tensor in saved.values()])
            return
        # Retain only the parts of a cache that the block has read, and not what other blocks have put there.
        given = self._given.tensors
        self._unread = {
            place: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            for place, tensor in enumerate(given)
            if id(tensor) in unread
        }
        self._states = len(states)
        self._kept = keep([*(tensor for tensor in given if id(tensor) not in unread), *states])
        self._given.tensors = []

    def _unpack(self, handle: _Handle) -> Tensor:
        with self._lock:
            if self._kept is None:  # unpacked in the forward itself
                return self._saved[handle.index]
            if self.reason:
                return self._kept()[self._places.index(handle.index)]
            if handle.index not in self._saved:
                self._saved = self._again()
            return self._saved.pop(handle.index)

    def _again(self) -> dict[int, Tensor]:
        """Repeat the call, and return the tensors that it saves."""
        self._moment.check_parameters(self._name)
        try:
            kept = self._kept()
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"an argument of {self._name} was written to in place after the call, and backward needs it to "
                "recompute the block; clone it before the write, or remove the block from `binding.recompute`."
            ) from error
        tensors, states = list(kept[: len(kept) - self._states]), list(kept[len(kept) - self._states :])
        for place, stand_in in self._unread.items():
            tensors.insert(place, stand_in)
        found: dict[int, Tensor] = {}
        shapes: list[tuple[torch.Size, torch.dtype]] = []

        def pack(tensor: Tensor) -> Tensor:
            index = len(shapes)
            shapes.append((tensor.shape, tensor.dtype))
            tensor = tensor.detach()
            if index < len(self._handles) and self._handles[index]() is not None:
                found[index] = tensor
            return tensor

        # New leaves: the block may register a hook on an argument, and the real argument has this hook already.
        args, kwargs = self._given.rebuild([t.detach().requires_grad_(t.requires_grad) for t in tensors])
        with self._as_before(states), saved_tensors_hooks(pack, lambda tensor: tensor):
            self._call(*args, **kwargs)
        if shapes != self._shapes:
            raise RuntimeError(
                f"{self._name} was recomputed in backward and did not repeat its forward: it saved {len(shapes)} "
                f"tensors, in forward {len(self._shapes)}, or other shapes; remove it from `binding.recompute`."
            )
        return found

    @contextmanager
    def _as_before(self, states: list[Tensor]) -> Iterator[None]:
        """Restore the modules, the random state and the autocast of the first call."""
        # fork_rng always saves the CPU's state, and also requires the name of an accelerator.
        kind = "cuda" if self._device == "cpu" else self._device
        fork = torch.random.fork_rng(devices=self._devices, enabled=bool(states), device_type=kind)
        with self._moment.back(), torch.enable_grad(), self._autocast(), fork:
            if states:
                torch.set_rng_state(states[0])
            if states and self._devices:
                set_device_states(self._devices, states[1:], device_type=self._device)
            yield


def _autocast_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that creates a context with the current autocast; some kinds of device have no autocast."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)


class Moment:
    """A snapshot of a block and all modules in it.

    Between forward and backward a user may call `eval()`, leave `disable_adapter()`, remove hooks or change a dropout.
    A recomputed block must run in its earlier state. The snapshot copies the contents of lists, dicts and sets, and
    stores other attributes by reference. So a second call does not change any of them.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._then = [_look(module) for module in modules]
        self._on_all = [hooks.copy() for hooks in _HOOKS_ON_ALL]
        self._names = [tuple(module._parameters) for module in modules]
        self._buffers = self._buffer_versions()
        # Python reuses the id of a deleted object, so the objects are kept.
        self._tensors = [t for m in modules for kind in (m._parameters, m._buffers) for t in kind.values()]
        self._parameters = self._parameter_values()
        self._storages = self._parameter_storages()

    def _parameter_values(self) -> dict[int, Any]:
        return {id(p): _values(p) for m in self._modules for p in m._parameters.values() if p is not None}

    def _parameter_storages(self) -> list[int | None]:
        """Return the identity of each parameter's memory, which `parameter.data = ...` replaces."""
        return [storage_of(p) for module in self._modules for p in module._parameters.values() if p is not None]

    def _buffer_versions(self) -> list[tuple[int, int, int | None]]:
        return [(id(b), *_values(b)) for module in self._modules for b in module._buffers.values() if b is not None]

    def buffers_changed(self) -> bool:
        """Whether a buffer was replaced or written in place since then."""
        return self._buffer_versions() != self._buffers

    def _written(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield the parameters that were written in place, by module and name; FSDP's new ones are not compared."""
        for module in self._modules:
            for key, p in module._parameters.items():
                if p is not None and self._parameters.get(id(p), now := _values(p)) != now:
                    yield module, key

    def was_written(self) -> bool:
        """Whether a buffer was replaced, or a buffer or a parameter was written in place since then."""
        return self.buffers_changed() or any(True for _ in self._written())

    def holds(self) -> bool:
        """Whether modules, parameters and buffers are as they were then."""
        if self.buffers_changed() or not all(map(_is_as, self._modules, self._then)):
            return False
        return self._parameter_values() == self._parameters and self._parameter_storages() == self._storages

    def check_parameters(self, name: str) -> None:
        """Raise an error if a parameter was written in place since then, or removed, as parametrizing and pruning do.

        Autograd raises the same for a tensor that it saved. Writes through .data are detected only for parameters of
        one dimension on a CPU: norms, biases.
        """
        pairs = ((module, key) for module, names in zip(self._modules, self._names, strict=True) for key in names)
        found = [(*pair, "replaced", "change the model") for pair in pairs if pair[1] not in pair[0]._parameters]
        found += [(*pair, "modified by an inplace operation", "step the optimizer") for pair in self._written()]
        for module, key, happened, action in found:
            raise RuntimeError(
                f"{key} of a {type(module).__name__} in {name} was {happened} between forward and backward, and "
                f"backward recomputes the block; {action} after backward, or remove the block from "
                "`binding.recompute`."
            )

    @contextmanager
    def back(self) -> Iterator[None]:
        """Restore the snapshot inside the `with` block, without scoring; restore the current state after it."""
        pairs = zip(self._modules, self._then, strict=True)
        now = [then if _is_as(module, then) else _look(module) for module, then in pairs]
        on_all = [hooks.copy() for hooks in _HOOKS_ON_ALL]
        with unscored(self._modules):
            try:
                self._put(self._then, self._on_all)
                yield
            finally:
                self._put(now, on_all)

    def _put(self, looks: Sequence[_Look], on_all: Sequence[dict[int, Any]]) -> None:
        for module, look in zip(self._modules, looks, strict=True):
            if not _is_as(module, look):
                _restore(module, look)
        for hooks, wanted in zip(_HOOKS_ON_ALL, on_all, strict=True):
            if hooks != wanted:
                hooks.clear()
                hooks.update(wanted)


def _values(tensor: Tensor) -> tuple[int, int | None]:
    """Return what a write changes: the version, and in one dimension on a CPU the values, for a write through .data."""
    return version(tensor), fingerprint(tensor) if tensor.dim() == 1 else None


class _Look(NamedTuple):
    """A module's class, its attributes, and the contents of attributes that are containers and not empty."""

    kind: type[nn.Module]
    attributes: dict[str, Any]
    contents: dict[str, Any]


def _look(module: nn.Module) -> _Look:
    contents = {name: value.copy() for name, value in _contents(module).items()}
    return _Look(type(module), module.__dict__.copy(), contents)


def _contents(module: nn.Module) -> dict[str, Any]:
    items = module.__dict__.items()
    return {name: v for name, v in items if type(v) in _CONTAINERS and v and name not in _ENGINES}


def _is_as(module: nn.Module, look: _Look) -> bool:
    """Whether nothing has changed, compared by identity, because comparing two tensors is not possible here."""
    own = module.__dict__
    if type(module) is not look.kind or len(own) != len(look.attributes):
        return False
    if not all(map(is_, own.values(), look.attributes.values())):
        return False
    full = _contents(module)
    return full.keys() == look.contents.keys() and all(_same(full[name], look.contents[name]) for name in full)


def _same(one: Any, other: Any) -> bool:
    if len(one) != len(other) or not all(map(is_, one, other)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), other.values()))


def _restore(module: nn.Module, look: _Look) -> None:
    own = module.__dict__
    engines = {name: own[name] for name in _ENGINES}
    own.clear()
    for name, value in look.attributes.items():
        if type(value) in _CONTAINERS:
            own[name] = look.contents[name].copy() if name in look.contents else type(value)()
        else:
            own[name] = value
    own.update(engines)
    if type(module) is not look.kind:  # bound at that time, and not now
        module.__class__ = look.kind
