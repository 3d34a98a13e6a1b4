"""Follows the bytes that live tensors occupy, operation by operation, on real tensors or on fake ones."""

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
    """Counts the bytes of every storage from the operation that makes it until the last tensor of it is gone.

    What a kernel allocates for itself and frees before it returns is not seen.

    Args:
        existing: tensors that are there already and do not count.
        on_draw: called at every operation that draws random numbers.
        fake: a `FakeTensorMode` is on; generators' states are real even so.

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
        self._existing = list(existing)  # alive, so that none of their identities can come again
        self._sizes: dict[int, int] = {}
        for tensor in self._existing:
            self._sizes.update({key: 0 for key, _ in storages(tensor)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it made."""
        kwargs = kwargs or {}
        self.peak = max(self.peak, self.now)
        if self._fake and func in _ON_STATES and _is_real(args):
            # Generators' states have values even where nothing else has: somebody keeps and compares them.
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


def _is_real(args: tuple[Any, ...]) -> bool:
    """Whether there are tensors among an operation's arguments, and none of them is fake."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return bool(tensors) and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))


def _adds_gradients(func: Any) -> bool:
    """Whether autograd adds two gradients up: in place with real tensors, but not with fake ones.

    There the sum counts when the next operation begins, and the term that it would have been written to is gone.
    """
    return func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() >= 0


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention kernels may draw, but do so only with a dropout."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[index] if index < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True
