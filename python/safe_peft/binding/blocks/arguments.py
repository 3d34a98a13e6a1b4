"""The arguments of a call, for a second call with the same arguments: the first call may fill a KV cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_SHAPES_ONLY = frozenset({"size", "dim", "numel", "ndimension", "stride", "__len__", "is_contiguous", "element_size"})


class _Slot(int):
    """The index of a tensor."""


class Given:
    """The arguments of a call before the call: containers and objects are copied, each tensor is listed once.

    With `compares`, `was_written` also compares values: a write through .data does not change the version.

    Example:
        >>> cache = {"keys": []}
        >>> given = Given((torch.ones(2), cache))
        >>> cache["keys"].append(torch.zeros(3))
        >>> given.rebuild(given.tensors)
        (tensor([1., 1.]), {'keys': []})
    """

    def __init__(self, value: Any, *, compares: bool = False) -> None:
        self.tensors: list[Tensor] = []
        self._slots: dict[int, _Slot] = {}
        self._direct = {id(leaf) for leaf in leaves(value) if isinstance(leaf, Tensor)}
        self._value = _copied(value, self._take, {})
        self._versions = [version(tensor) for tensor in self.tensors]
        real = (t for t in self.tensors if compares and not (t.is_meta or isinstance(t, FakeTensor)))
        self._copies = [(tensor, tensor.detach().clone()) for tensor in real]

    def _take(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._slots:
            self._slots[id(value)] = _Slot(len(self.tensors))
            self.tensors.append(value)
        return self._slots[id(value)]

    @property
    def in_objects(self) -> list[Tensor]:
        """Tensors that are only in objects, such as the keys and values in a cache."""
        return [tensor for tensor in self.tensors if id(tensor) not in self._direct]

    def was_written(self) -> bool:
        """Whether a tensor was written in place since then. Call it once: it drops the stored values."""
        copies, self._copies = self._copies, []
        if [version(tensor) for tensor in self.tensors] != self._versions:
            return True
        return any(not torch.equal(tensor, then) for tensor, then in copies)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """Return the arguments before the call, with other tensors in the places of `self.tensors`."""
        return _copied(self._value, lambda value: tensors[value] if type(value) is _Slot else None, {})


class TensorsUsed(TorchFunctionMode):
    """Records the tensors that operations read; a call that reads only a shape does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()  # ids of tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _SHAPES_ONLY and (name != "__get__" or isinstance(result, Tensor)):
            self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return result


def version(tensor: Tensor) -> int:
    """Return PyTorch's count of in-place writes to a tensor; -1 for an inference tensor."""
    return -1 if tensor.is_inference() else tensor._version


def leaves(value: Any) -> Iterator[Any]:
    """Yield the items of arguments, inside tuples, lists and dicts; objects are not opened, unlike in pytree."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def may_carry(value: Any) -> bool:
    """Whether an argument is an object that may contain tensors, and not a tensor, number, function or module."""
    plain = isinstance(value, Tensor | nn.Module | type) or callable(value)
    return not plain and hasattr(value, "__dict__")


def _copied(value: Any, leaf: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    """Copy containers and objects recursively; where `leaf` returns a value, take this value instead."""
    replaced = leaf(value)
    if replaced is not None:
        return replaced
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [_copied(item, leaf, memo) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if not isinstance(value, list | dict | set) and not may_carry(value):
        return value
    new = memo[id(value)] = copy.copy(value)
    if isinstance(value, list):
        list.__setitem__(new, slice(None), [_copied(item, leaf, memo) for item in value])
    elif isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(new, key, _copied(item, leaf, memo))
    if hasattr(new, "__dict__"):
        for name, item in vars(value).items():
            vars(new)[name] = _copied(item, leaf, memo)
    return new
