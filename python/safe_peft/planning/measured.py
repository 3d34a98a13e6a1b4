"""Measures what a step retains from the training's own forward, for models that do not run without values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import Recorder, storages

from ..binding.adapters import Adapter
from ..distributed.wrappers import buffers_of, parameters_of
from .accounts import Accounts
from .retained import RetainedTable


class Measurement:
    """The measurement of one forward of the user. Nothing is computed twice, and no tensor is kept longer.

    Args:
        model: the whole model.
        adapters: the model's adapters that train.
        called: the called module.
        arguments: the arguments of the call.
    """

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
        """Return what the forward retains; None if no tensor in its output has a graph.

        Args:
            output: the forward's output.
        """
        if not self.abandon():
            return None
        tensors = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
        roots = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
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
        """Stop the measurement. After an interrupt, other hooks may be on top of ours.

        Returns:
            Whether the forward was measured up to this call.
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


def _plain(output: Any) -> Any:
    """Return the contents of an output that pytree treats as a leaf, such as a dataclass."""
    if isinstance(output, Tensor | Mapping | list | tuple) or not hasattr(output, "__dict__"):
        return output
    return list(vars(output).values())


def joined(tables: Iterable[RetainedTable]) -> RetainedTable | None:
    """Return the table of several forwards together.

    Args:
        tables: one table per forward, in their order.
    """
    found: RetainedTable | None = None
    for table in tables:
        found = table if found is None else found.joined(table)
    return None if found is None else found.compact()
