"""Counts the bytes of live tensors after each operation, for real tensors and for fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from safe_kernels.retention import storages

_ON_STATES = frozenset({torch.ops.aten.equal.default, torch.ops.aten.detach.default})


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage, from the operation that creates it until its last tensor is deleted.

    Memory that a kernel allocates and frees before it returns is not counted.

    Args:
        existing: tensors that exist already and do not count.
        on_draw: called at every operation that draws random numbers.
        fake: whether a `FakeTensorMode` is on; the states of generators are real tensors in this mode too.

    Example:
        >>> with LiveBytes() as live:
        ...     x = torch.ones(1024)
        ...     y = (x + 1) * 2
        >>> live.now, live.peak
        (8192, 12288)
    """

    def __init__(
        self, existing: Iterable[Tensor] = (), on_draw: Callable[[], None] | None = None, *, fake: bool = False
    ) -> None:
        super().__init__()
        self._fake = fake
        self.now = self.peak = 0
        self._on_draw = on_draw
        self._existing = list(existing)  # kept alive, so that their ids are not used again
        self._sizes = {key: 0 for tensor in self._existing for key, _ in storages(tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count its results."""
        kwargs = kwargs or {}
        self.peak = max(self.peak, self.now)
        if self._fake and func in _ON_STATES and not any(isinstance(arg, FakeTensor) for arg in args):
            # Generators' states need values even in fake mode, because other code stores and compares them.
            with _disable_current_modes():
                return func(*args, **kwargs)
        if self._on_draw is not None and torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            self._on_draw()
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if not _adds_gradients(func):
            self.peak = max(self.peak, self.now)
        return result

    def _count(self, tensor: Tensor) -> None:
        key, size = next(storages(tensor))
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        weakref.finalize(tensor.untyped_storage(), self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _adds_gradients(func: Any) -> bool:
    """Whether autograd adds two gradients. Real tensors are added in place, fake tensors are not.

    For fake tensors, the sum counts when the next operation begins: then the term that it would replace is deleted.
    """
    return func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() >= 0


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers: attention kernels draw only with dropout."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True
