"""Measures what autograd keeps from a forward pass, tensor by tensor.

The numbers are exact and do not come from an allocator or from samples. Every tensor that autograd saves passes through
a hook. Storages that the graph still holds when the measured function returns are counted, each storage once.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from safe_kernels import _C

__all__ = ["Recorder", "RetainedTensor", "Retention", "Save", "announce_reader", "measure", "record"]


class RetainedTensor(NamedTuple):
    """One storage that autograd holds. A saved slice keeps the whole storage alive."""

    shape: tuple[int, ...]  # of the largest tensor that was saved from this storage
    dtype: torch.dtype  # of that tensor
    bytes: int  # of the whole storage
    uses: int  # number of times it was saved


class Save(NamedTuple):
    """One tensor that one node of the graph holds."""

    tensor: Tensor  # detached; its storage is the node's own
    note: Any  # the result of `note()` when it was saved
    made_by: int = -1  # sequence number of the node that made it; -1 for a leaf or a tensor outside the graph


class Dropped(NamedTuple):
    """One tensor that a node no longer holds: the node has released it, or is dead."""

    storage: weakref.ref[Any]
    key: int  # the storage's identity, valid while the storage lives
    bytes: int  # of the storage
    note: Any  # the result of `note()` when it was saved


@dataclass(frozen=True, repr=False)
class Retention:
    """The tensors that a function's autograd graph retains; printing it gives a table.

    Attributes:
        bytes: all retained bytes, each storage counted once.
        tensors: the retained storages, largest first.
        output: the function's output. It keeps the graph alive, and backward works on it.
    """

    bytes: int
    tensors: tuple[RetainedTensor, ...]
    output: Any

    def __str__(self) -> str:
        rows = [("bytes", "shape", "dtype", "uses")]
        for tensor in self.tensors:
            shape = " x ".join(map(str, tensor.shape)) or "scalar"
            rows.append((f"{tensor.bytes:,}", shape, str(tensor.dtype).removeprefix("torch."), str(tensor.uses)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{size:>{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {uses:>{widths[3]}}"
            for size, shape, dtype, uses in rows
        ]
        return "\n".join([*lines, f"{self.bytes:,} bytes retained in {len(self.tensors)} tensors"])

    def __repr__(self) -> str:
        return f"Retention(bytes={self.bytes}, tensors=<{len(self.tensors)}>)"


def measure(fn: Callable[[], Any], *, exclude: Tensor | nn.Module | Iterable[Tensor | nn.Module] = ()) -> Retention:
    """Runs ``fn()`` and measures the tensors that autograd keeps for backward.

    Tensors count if the graph still holds them when ``fn`` returns, so ``fn`` must return the loss, or another tensor
    that keeps the graph alive. A storage saved by several nodes or through several views counts once, with its full
    size.

    Backward needs weights too, but they exist anyway. So parameters and buffers of modules that ``fn`` names, as
    ``model`` in ``lambda: model(x)``, do not count. Parameters that ``fn`` names do not count either, and aliases of
    these (``weight.t()``, ``weight.detach()``). Pass modules that ``fn`` reaches in another way as ``exclude``.

    Tensors that other hooks inside ``fn`` save (activation checkpointing, ``save_on_cpu``) are not counted. Hooks
    outside of ``fn`` do not see its saved tensors. Hooks belong to a thread, so saves in other threads do not count.

    Args:
        fn: called once, without arguments, in this thread.
        exclude: tensors whose storages do not count, since they exist anyway: a tensor, a module (its parameters and
            buffers), or an iterable of these.

    Returns:
        The bytes, the list of tensors, and the function's output, on which ``backward()`` still works.

    Raises:
        TypeError: ``fn`` is not callable, or ``exclude`` contains neither a tensor nor a module.

    Example:
        >>> import torch
        >>> from safe_kernels import retention
        >>> layer, x = torch.nn.Linear(8, 4), torch.ones(2, 8)
        >>> retained = retention.measure(lambda: layer(x).relu().sum())
        >>> retained.bytes, [tuple(tensor.shape) for tensor in retained.tensors]
        (96, [(2, 8), (2, 4)])
        >>> retained.output.backward()
    """
    if not callable(fn):
        raise TypeError(
            f"measure(): fn must be callable, got {type(fn).__name__}; wrap the call, as in measure(lambda: model(x))"
        )
    excluded = list(_tensors([exclude, _named_by(fn)]))
    output, saves = record(fn)
    known = {key for tensor in excluded if not is_lazy(tensor) for key, _ in storages(tensor)}
    tensors = _by_storage((save.tensor for save in saves), known)
    return Retention(sum(tensor.bytes for tensor in tensors), tensors, output)


def record(fn: Callable[[], Any], note: Callable[[], Any] = lambda: None) -> tuple[Any, list[Save]]:
    """Runs ``fn()`` and returns its output and every save that the output's graph still holds, in their order.

    `measure` counts these saves. This function returns them, with parameters, and with the result of `note()` at each
    save. It has the same limits. While the saves live, their storages have different identities.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> output, saves = record(lambda: x.exp().sin(), note=lambda: "here")
        >>> [(tuple(save.tensor.shape), save.note) for save in saves]
        [((3,), 'here'), ((3,), 'here')]
    """
    recorder = Recorder(note)
    with saved_tensors_hooks(recorder.pack, recorder.unpack):
        output = fn()
    return output, recorder.saves()


class Recorder:
    """Hooks for `saved_tensors_hooks` that record autograd's saves, for code that is not one function call.

    Args:
        note: called at each save.

    Example:
        >>> x, recorder = torch.ones(3, requires_grad=True), Recorder()
        >>> with saved_tensors_hooks(recorder.pack, recorder.unpack):
        ...     y = x.exp()
        >>> len(recorder.saves())
        1
    """

    def __init__(self, note: Callable[[], Any] = lambda: None) -> None:
        self._note = note
        self._refs: list[tuple[weakref.ref[_Saved], Dropped | None]] = []

    def pack(self, tensor: Tensor) -> _Saved:
        """Keep a tensor for a node."""
        saved, found = _Saved(tensor, self._note()), list(storages(tensor))
        plain = len(found) == 1 and not is_traceable_wrapper_subclass(tensor)
        later = Dropped(weakref.ref(tensor.untyped_storage()), *found[0], saved.note) if plain else None
        self._refs.append((weakref.ref(saved), later))
        return saved

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        """Return the tensor."""
        return saved.unpack()

    def saves(self) -> list[Save]:
        """Return every save that a graph still holds, in their order."""
        held = (saved for ref, _ in self._refs if (saved := ref()) is not None)
        return [Save(saved.tensor, saved.note, saved.made_by) for saved in held]

    def dropped(self) -> list[Dropped]:
        """Return the plain tensors that were saved and are no longer held, in the order of the saves."""
        return [later for ref, later in self._refs if ref() is None and later is not None]


def storages(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yields identity and size in bytes of a tensor's storages: one, except for a subclass or a sparse tensor.

    An identity is valid while a tensor with that storage lives.

    Example:
        >>> x = torch.ones(4, 4)
        >>> list(storages(x[1])) == list(storages(x)), next(storages(x))[1]
        (True, 64)
    """
    yield from (_storage(leaf) for leaf in _leaves(tensor))


def announce_reader(x: Tensor) -> None:
    """Announces that autograd will keep `x` for a layer that is not an op of this package.

    If `x` is the output of `rms_norm` or `layer_norm`, that op releases its input and keeps `x` too. The ops of this
    package call this themselves. For any other tensor it has no effect.

    Example:
        >>> import safe_kernels
        >>> x, A = torch.ones(2, 8, requires_grad=True), torch.nn.Parameter(torch.ones(4, 8))
        >>> def run(announce):
        ...     y = safe_kernels.rms_norm(x * 1.0, torch.ones(8), 1e-6)
        ...     announce(y)
        ...     return torch.nn.functional.linear(y, A)
        >>> [measure(lambda: run(hear), exclude=A).bytes for hear in (announce_reader, id)]  # 32 are the norm's weight
        [104, 168]
    """
    _C.announce_reader(x)


class _Saved:
    """The graph holds this object instead of a tensor. A weak reference shows when its node has died."""

    __slots__ = ("__weakref__", "made_by", "note", "tensor", "version")

    def __init__(self, tensor: Tensor, note: Any) -> None:
        # Detached: otherwise an output saved by its own node would keep that node alive in a cycle.
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.note = note
        self.made_by = -1 if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()

    def unpack(self) -> Tensor:
        # With hooks, autograd does not make this check.
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {list(self.tensor.shape)} that backward needs was modified in place after it was "
                f"saved: it is at version {self.tensor._version}, expected {self.version}; clone it before changing it"
            )
        return self.tensor


def _tensors(exclude: Any) -> Iterator[Tensor]:
    """Flattens tensors, modules and iterables of these to tensors."""
    if isinstance(exclude, Tensor):
        yield exclude
    elif isinstance(exclude, nn.Module):
        yield from exclude.parameters()
        yield from exclude.buffers()
    elif isinstance(exclude, Iterable) and not isinstance(exclude, (str, bytes)):
        for item in exclude:
            yield from _tensors(item)
    else:
        raise TypeError(
            f"measure(): exclude takes tensors, modules or iterables of these, got {type(exclude).__name__}"
        )


def _named_by(fn: Callable[[], Any]) -> Iterator[nn.Module | nn.Parameter]:
    """Modules and parameters that a function names, and the module whose method it is."""
    function = getattr(fn, "__func__", fn)
    found = [fn, getattr(fn, "__self__", None)]
    if inspect.isfunction(function):
        found += function.__defaults__ or ()
        found += (cell.cell_contents for cell in function.__closure__ or () if cell != CellType())
        found += (function.__globals__.get(name) for name in function.__code__.co_names)
    return (one for one in found if isinstance(one, (nn.Module, nn.Parameter)))


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The inner tensors of a subclass or a sparse tensor, each with its own storage."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        parts = [part for name in names if isinstance(part := getattr(tensor, name), Tensor)]
    elif tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        yield tensor
        return
    for part in parts:
        yield from _leaves(part)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Identity and size of a tensor's storage; for a tensor without a visible storage, its own identity."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return id(tensor), tensor.numel() * tensor.element_size()
    return storage._cdata, storage.nbytes()


def _by_storage(tensors: Iterable[Tensor], known: set[int]) -> tuple[RetainedTensor, ...]:
    found: dict[int, RetainedTensor] = {}
    for leaf in (leaf for tensor in tensors for leaf in _leaves(tensor)):
        key, size = _storage(leaf)
        if key in known:
            continue
        new = RetainedTensor(tuple(leaf.shape), leaf.dtype, size, 1)
        old = found.get(key, new._replace(uses=0))
        widest = max(old, new, key=lambda item: math.prod(item.shape))
        found[key] = widest._replace(uses=old.uses + 1)
    return tuple(sorted(found.values(), key=lambda item: -item.bytes))
