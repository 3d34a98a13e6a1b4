"""Runs a block whose adapters are all frozen again in backward, so that it keeps nothing but its arguments.

The semantics are those of `torch.utils.checkpoint(use_reentrant=False)`: forward builds the graph, so gradients reach
whatever goes into the block or comes out of it, by argument, hook or cache; what its nodes saved is dropped, and made
again when backward asks for it. It is not that function, for two reasons. Whether a block can run again exactly shows
only after it has run: one that wrote into an argument keeps what it saved. And the second call is given what the first
one was given: a cache as it was before it was filled, modules in the mode and with the hooks that they had.
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
COUNTED = "it changes buffers of its own in each call, as a batch norm does"


class _Handle:
    """What a node of the graph holds in the place of a tensor."""

    __slots__ = ("__weakref__", "index")

    def __init__(self, index: int) -> None:
        self.index = index


class Run:
    """One call of a block, which can be repeated.

    Exact: dropout draws the same numbers, autocast and modules are as they were. Where the block draws random numbers
    their generators' states are kept too (5,056 bytes on a CPU).

    Args:
        call: what to call.
        block: the module that it belongs to.
        name: what error messages call it.

    Attributes:
        reason: why the call keeps what it saved, and does not run again; "" if it does.

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
        """Make the call, and drop what its graph saved."""
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
            self._saved = {}  # what nodes have made: their hooks lead here, in a cycle that no collector sees
            raise
        drew = bool(self._devices) or not torch.equal(before, torch.get_rng_state())
        self._settle([before, *states] if drew else [], {id(t) for t in objects if used and not used.has(t)})
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):  # `_kept` keeps the hooks around this call alive as long as its graph
                leave_hooks(leaf, unpack)
        return output

    def _pack(self, tensor: Tensor) -> _Handle:
        handle = _Handle(len(self._handles))
        self._handles.append(weakref.ref(handle))
        self._shapes.append((tensor.shape, tensor.dtype))
        self._saved[handle.index] = tensor
        return handle

    def _settle(self, states: list[Tensor], unread: set[int]) -> None:
        """Drop what was saved if the call can run again, and keep what that takes."""
        saved = {index: tensor for index, tensor in self._saved.items() if self._handles[index]() is not None}
        self._saved = {}
        if not saved:
            return
        self.reason = WROTE if self._given.was_written() else COUNTED if self._moment.buffers_changed() else ""
        if self.reason:
            # Detached: what a node has made itself would keep that node alive in a cycle.
            self._places = list(saved)
            self._kept = _keep([tensor.detach() for tensor in saved.values()])
            return
        # Of a cache only what the block has read: all of it would keep what other blocks have put there.
        given = self._given.tensors
        self._unread = {place: _without_values(t) for place, t in enumerate(given) if id(t) in unread}
        self._states = len(states)
        kept = [tensor for tensor in given if id(tensor) not in unread]
        self._kept = _keep([*kept, *states])
        self._given.tensors = []

    # ---------------------------------------------------------------- backward

    def _unpack(self, handle: _Handle) -> Tensor:
        with self._lock:
            if self._kept is None:  # asked for in forward itself
                return self._saved[handle.index]
            if self.reason:
                return self._kept.saved_tensors[self._places.index(handle.index)]
            if handle.index not in self._saved:
                self._saved = self._again()
            return self._saved.pop(handle.index)

    def _again(self) -> dict[int, Tensor]:
        """What the call saves, once more."""
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

        # Leaves of their own: a hook that the block puts on an argument is not to be put on the real one again.
        args, kwargs = self._given.rebuild([t.detach().requires_grad_(t.requires_grad) for t in tensors])
        with self._as_before(states), saved_tensors_hooks(pack, lambda tensor: tensor):
            self._call(*args, **kwargs)
        if shapes != self._shapes:
            raise RuntimeError(
                f"{self._name} runs again in backward, and did not do the same as in forward: it saved "
                f"{len(shapes)} tensors, then {len(self._shapes)}, or others; take it out of `binding.recompute`."
            )
        return found

    def _arguments(self) -> tuple[Tensor, ...]:
        try:
            saved: tuple[Tensor, ...] = self._kept.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"an argument of {self._name} was written to in place after the call, and the block needs it to run "
                "again in backward; clone it before the write, or take the block out of `binding.recompute`."
            ) from error
        return saved

    @contextmanager
    def _as_before(self, states: Sequence[Tensor]) -> Iterator[None]:
        """The modules, the random state and the autocast of the first call."""
        device = self._device
        with ExitStack() as stack:
            stack.enter_context(self._moment.back())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._autocast())
            if states:
                # fork_rng saves the CPU's state in any case, and wants an accelerator's name besides.
                kind = "cuda" if device == "cpu" else device
                stack.enter_context(torch.random.fork_rng(devices=list(self._devices), device_type=kind))
                torch.set_rng_state(states[0])
                if self._devices:
                    set_device_states(list(self._devices), list(states[1:]), device_type=device)
            yield


class _Keep(torch.autograd.Function):
    """A node that holds tensors: hooks around the block see them, and writes in place to them are noticed."""

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
    """Return what makes autocast as it is now; some kinds of device have none."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype=dtype, enabled=enabled)
