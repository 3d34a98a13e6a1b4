"""Records the shapes of a training's largest step, and measures its forwards for models that need values to run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Recorder, storages

from ..binding.adapters import Adapter
from ..binding.forward_hooks import Call, Watcher, named_arguments
from ..distributed.wrappers import buffers_of, parameters_of, walk
from .accounts import Accounts
from .inputs import Inputs, largest
from .retained import Measured, RetainedTable


class Measurement:
    """The measurement of one forward of the user. Nothing is computed twice, and no tensor is kept longer."""

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], called: nn.Module, arguments: Any) -> None:
        self._model = model
        self._accounts = Accounts(model, adapters)
        self._batch = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        self._recorder = Recorder(self._accounts.note)
        self._watching = ExitStack()
        self._watching.enter_context(self._accounts.watching())
        self._watching.enter_context(_before_hooks_are_disabled(self._give_way))
        self._accounts.enter(called)
        self._pack = self._recorder.pack
        torch._C._autograd._push_saved_tensors_default_hooks(self._pack, self._recorder.unpack)
        self._open = True

    def end(self, output: Any) -> RetainedTable | None:
        """Return what the forward retains; None if no tensor in its output has a graph."""
        if not self.abandon():
            return None
        if not isinstance(output, Tensor | Mapping | list | tuple) and hasattr(output, "__dict__"):
            output = list(vars(output).values())  # pytree treats a dataclass as a leaf
        leaves = tree_leaves(output)
        roots = [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        if not roots:
            return None
        existing = [*parameters_of(self._model), *buffers_of(self._model), *self._batch]
        known = {key for tensor in existing for key, _ in storages(tensor)}
        return self._accounts.table(self._recorder, roots, known).compact()

    def _give_way(self) -> None:
        if self._is_on_top():
            self.abandon()

    def _is_on_top(self) -> bool:
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return top is not None and top[0] == self._pack

    def abandon(self) -> bool:
        """Stop the measurement, and return whether the forward was measured up to this call.

        After an interrupt, other hooks may be on top of ours.
        """
        self._watching.close()
        was_open, self._open = self._open, False
        if not was_open or not self._is_on_top():
            return False
        torch._C._autograd._pop_saved_tensors_default_hooks()
        return True


@contextmanager
def _before_hooks_are_disabled(call: Callable[[], None]) -> Iterator[None]:
    """Call a function before the user's forward disables hooks for saved tensors, as `torch.func.grad` does.

    It would raise an error while hooks are set.
    """
    own = torch._C._autograd._saved_tensors_hooks_disable

    def disable(*args: Any, **kwargs: Any) -> None:
        call()
        own(*args, **kwargs)

    torch._C._autograd._saved_tensors_hooks_disable = disable
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_disable = own


class Seen:
    """The shapes of the largest step of a training so far.

    A step consists of all calls between two backwards: usually one call of the model, but also one call per tower, or
    two calls of one model for the halves of a pair. If models call each other, the outermost one with tensors counts.

    Args:
        model: the model that trains.
        exact: whether decisions depend on the result; then several calls make one step, and masks are read for padding.
        larger: called when a step is the largest so far.
        measure: called with a module and the arguments of its forward; may return a measurement of this forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        exact: bool,
        larger: Callable[[Inputs], None],
        measure: Callable[[nn.Module, Any], Measurement | None],
    ) -> None:
        self.inputs: Inputs | None = None
        self.measured: Measured | None = None
        self._measure = measure
        self._tables: list[RetainedTable] = []
        self._measurement: Measurement | None = None
        self._exact = exact
        self._larger = larger
        self._paths = {id(module): name for name, module in walk(model)}
        self._step: list[Inputs] = []
        self._running = False
        self._watcher = Watcher(model, self._begin, self._end)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._abandon()
        self._watcher.close()

    def suspended(self) -> AbstractContextManager[None]:
        """Return a context in which calls are ignored."""
        return self._watcher.suspended()

    def end_step(self) -> None:
        """End a step: backward of the calls so far has begun."""
        self._step.clear()
        self._tables.clear()

    def _begin(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Record a training batch if it is the largest so far."""
        inside = call.outer is not None and call.outer.notes.get("noted", False)
        call.notes["noted"] = inside
        trains = call.task == -1 and torch.is_grad_enabled() and call.module.training
        if inside or self._watcher.is_suspended or not trains:
            return
        batch = named_arguments(call.module, args, kwargs)
        if largest(batch) == 0:
            return
        call.notes["noted"] = call.notes["outermost"] = True
        if self._running:  # an interrupt ended the last call, without a call of `_end`
            self._abandon()
            del self._step[-1:]
        self._running = True
        before, known = (self._step if self._exact else []), self.inputs
        elements = largest(batch) + sum(one.elements for one in before)
        padding_is_known = known is not None and known.padded
        larger = known is None or (elements, self._exact and not padding_is_known) > (known.elements, False)
        if not self._exact and not larger:
            return
        padded = None if larger and not padding_is_known else padding_is_known
        one = Inputs.of(batch, padded=padded, autocast=True, source=self._paths.get(id(call.module), ""))
        self._step = [*before, one]
        if larger:
            self._note(known)
        if self.measured is None or elements >= self.measured.elements:
            self._measurement = self._measure(call.module, (args, kwargs))

    def _note(self, known: Inputs | None) -> None:
        first, *further = self._step
        padded = any(one.padded for one in self._step)
        seen = replace(first, padded=padded, further=tuple(further))
        if known is None or order(seen)[:2] > order(known)[:2]:
            self.inputs = seen
            self._larger(seen)

    def _end(self, call: Call, output: Any, died: bool) -> None:
        """Remove a call that raised an error; other calls end with the backward through their output."""
        if not call.notes.get("outermost"):
            return
        self._running = False
        if not self._exact or not self._step:
            return
        if died:
            self._abandon()
            self._step.pop()
            return
        self._note_table(output)
        tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad)
        if (first := next(tensors, None)) is not None:
            first.register_hook(_Backward(self))

    def _note_table(self, output: Any) -> None:
        measurement, self._measurement = self._measurement, None
        table = measurement.end(output) if measurement is not None else None
        if table is None:
            return
        self._tables.append(table)
        if len(self._tables) != len(self._step):
            return
        together = reduce(RetainedTable.joined, self._tables).compact()
        found, best = Measured(sum(one.elements for one in self._step), together), self.measured
        if best is None or (found.elements, together.bytes()) > (best.elements, best.table.bytes()):
            self.measured = found

    def _abandon(self) -> None:
        if self._measurement is not None:
            self._measurement.abandon()
            self._measurement = None


class _Backward:
    """A hook on a gradient that keeps nothing alive."""

    def __init__(self, seen: Seen) -> None:
        self._seen = weakref.ref(seen)

    def __call__(self, gradient: Tensor) -> None:
        if (seen := self._seen()) is not None:
            seen.end_step()


def order(inputs: Inputs) -> tuple[int, bool, str]:
    """Return the sort key of a batch: of batches with the same size, one with padding comes last."""
    return inputs.elements, inputs.padded, repr(inputs)
