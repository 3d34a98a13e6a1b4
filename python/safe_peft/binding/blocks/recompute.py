"""Recomputes a frozen block in backward, so that the block retains only its arguments.

The semantics are those of `torch.utils.checkpoint(use_reentrant=False)`. Forward builds the graph, so gradients reach
everything that enters or leaves the block, by argument, hook or cache. The tensors that its nodes saved are dropped,
and backward computes them again. This module does not use that function, for two reasons. First, only a finished call
shows whether a block can be recomputed exactly: a block that wrote into an argument retains its tensors. Second, the
second call needs the state of the first: the cache before it was filled, and the mode and hooks of the modules.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from safe_kernels.inversion import leave_hooks

from .arguments import Given, TensorsUsed
from .moment import Moment
from .trains import may_ask_for_gradient, modules_in

WROTE = "it writes into its arguments in place, as a static cache does"
COUNTED = "it changes its own buffers in each call, as a batch norm does"


class _Handle:
    """The object that a graph node saves instead of a tensor."""

    __slots__ = ("__weakref__", "index")

    def __init__(self, index: int) -> None:
        self.index = index


class Run:
    """One call of a block that can be repeated exactly.

    In the second call, dropout draws the same numbers, and autocast and modules have the same state. If the block draws
    random numbers, the states of the generators are retained too (5,056 bytes on a CPU).

    Args:
        call: the function to call.
        block: the module that the function belongs to.
        name: the block's name in error messages.

    Attributes:
        reason: why the call retains its tensors and is not repeated; "" if it is repeated.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> Run(torch.sin).first((x,), {}).sum().backward()
        >>> torch.equal(x.grad, torch.cos(x.detach()))
        True
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

    # ---------------------------------------------------------------- forward

    def first(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make the call, and drop the tensors that its graph saved."""
        self._given = given = Given((tuple(args), dict(kwargs)), compares=self._is_hooked)
        self._device = next((tensor.device.type for tensor in given.tensors), "cpu")
        self._autocast = autocast_now(self._device)
        before, (self._devices, states) = torch.get_rng_state(), get_device_states(*given.tensors)
        objects = given.in_objects
        unpack = self._unpack
        try:
            with saved_tensors_hooks(self._pack, unpack), TensorsUsed() if objects else nullcontext() as used:
                output = self._call(*args, **kwargs)
        except BaseException:
            self._saved = {}  # the nodes' hooks refer to this object, in a cycle that the collector cannot find
            raise
        drew = bool(self._devices) or not torch.equal(before, torch.get_rng_state())
        self._settle([before, *states] if drew else [], {id(t) for t in objects if used and not used.has(t)})
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
        self.reason = WROTE if self._given.was_written() else COUNTED if self._moment.buffers_changed() else ""
        if self.reason:
            # Detached, because a node's own output would keep the node alive in a cycle.
            self._places = list(saved)
            self._kept = _keep([tensor.detach() for tensor in saved.values()])
            return
        # Retain only the parts of a cache that the block has read, and not what other blocks have put there.
        given = self._given.tensors
        self._unread = {place: _without_values(t) for place, t in enumerate(given) if id(t) in unread}
        self._states = len(states)
        kept = [tensor for tensor in given if id(tensor) not in unread]
        self._kept = _keep([*kept, *states])
        self._given.tensors = []

    # ---------------------------------------------------------------- backward

    def _unpack(self, handle: _Handle) -> Tensor:
        with self._lock:
            if self._kept is None:  # unpacked in the forward itself
                return self._saved[handle.index]
            if self.reason:
                return self._kept.saved_tensors[self._places.index(handle.index)]
            if handle.index not in self._saved:
                self._saved = self._again()
            return self._saved.pop(handle.index)

    def _again(self) -> dict[int, Tensor]:
        """Repeat the call, and return the tensors that it saves."""
        self._moment.check_parameters(self._name)
        kept = self._arguments()
        tensors, states = list(kept[: len(kept) - self._states]), kept[len(kept) - self._states :]
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

        # New leaves, so that a hook that the block puts on an argument is not registered twice on the real argument.
        args, kwargs = self._given.rebuild([t.detach().requires_grad_(t.requires_grad) for t in tensors])
        with self._as_before(states), saved_tensors_hooks(pack, lambda tensor: tensor):
            self._call(*args, **kwargs)
        if shapes != self._shapes:
            raise RuntimeError(
                f"{self._name} was recomputed in backward and did not repeat its forward: it saved {len(shapes)} "
                f"tensors, in forward {len(self._shapes)}, or other shapes; remove it from `binding.recompute`."
            )
        return found

    def _arguments(self) -> tuple[Tensor, ...]:
        try:
            saved: tuple[Tensor, ...] = self._kept.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"an argument of {self._name} was written to in place after the call, and backward needs it to "
                "recompute the block; clone it before the write, or remove the block from `binding.recompute`."
            ) from error
        return saved

    @contextmanager
    def _as_before(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Restore the modules, the random state and the autocast of the first call."""
        device = self._device
        with ExitStack() as stack:
            stack.enter_context(self._moment.back())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._autocast())
            if states:
                # fork_rng always saves the CPU's state, and also requires the name of an accelerator.
                kind = "cuda" if device == "cpu" else device
                stack.enter_context(torch.random.fork_rng(devices=list(self._devices), device_type=kind))
                torch.set_rng_state(states[0])
                if self._devices:
                    set_device_states(list(self._devices), list(states[1:]), device_type=device)
            yield


class _Keep(torch.autograd.Function):
    """A node that saves tensors, so that hooks around the block see them and in-place writes to them are detected."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on this node")


def _keep(tensors: Sequence[Tensor]) -> Any:
    with torch.enable_grad():
        return _Keep.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def autocast_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that creates a context with the current autocast; some kinds of device have no autocast."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)
