"""Choosing by measurement, as an option: which tiles a kernel takes, and whether the fused form is faster.

`triton.autotune` cannot make these choices. It chooses inside a launch, and here results are allocated before that:
how many parts of a sum there are, and so their memory, depends on the tiles. Some candidates are no tiles of a kernel,
but a product of the vendor's library, or another op. It has no switch: it times even a single candidate, it also
does so while a CUDA graph is captured, and a candidate that runs out of memory fails the call.

Triton is imported where something is measured, and not before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from safe_kernels.triton.runtime.launch_replay import forget
from safe_kernels.triton.runtime.tuning_store import Store

Run = Callable[[], Any]
Offer = Callable[[], tuple[str, Mapping[Any, Run]]]
Call = tuple[Any, ...]


class autotune:
    """Makes the Triton kernels measure which tiles suit a call, instead of taking them from a table.

    A function and a context manager, like `torch.set_grad_enabled`. It is off by default, and one switch for the whole
    process, since backward runs in threads of its own. While it is on, the first call of a kernel with a new size (its
    powers of two), rank, dtype and kind of GPU times a handful of configurations on its own arguments; some tenths of a
    second, once. The fastest is remembered for the process, and in a file for the next one. So is whether a linear
    layer and its adapter are faster in one, as `lora_linear`, than as `lora` over cuBLAS.

    Nothing else changes: results, random numbers and statistics are those of the calls alone. Timing takes some memory,
    up to 256 MB to flush the GPU's cache; a candidate that does not fit is left out. Nothing is measured while a CUDA
    graph is captured, under tracing, or on a CPU; such calls take what is remembered, or the table.

    Tiles decide in which order numbers are added. Within a process a call repeats to the bit; two processes, ranks of
    one training among them, may choose otherwise and differ in the last bits. What is shared by a file is chosen alike.

    Args:
        enabled: whether to measure from here on.
        cache: folder for the file; None: $SAFE_KERNELS_CACHE, or ~/.cache/safe_kernels.

    Raises:
        TypeError: `enabled` is no bool, or `cache` no path.
        ValueError: `cache` is not a folder, or there is no home folder to have one in.

    Example:
        >>> import safe_kernels
        >>> with safe_kernels.autotune():
        ...     pass  # train; or call it once, before training
        >>> _ = safe_kernels.autotune(False)
    """

    def __init__(self, enabled: bool = True, *, cache: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True or False, got {enabled!r}; a folder goes into cache=")
        self._before = _STATE.tuner
        _switch(_tuner(folder(cache)) if enabled else None)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self._before)


class Tuner:
    """Times what it is offered, and remembers the fastest.

    Args:
        folder: where it keeps a file for each kind of device.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stores: dict[str, Store] = {}
        self._settled: dict[Call, Any] = {}

    def choose(self, call: Call, offer: Offer, like: Tensor | None) -> Any:
        """The fastest of what is offered.

        Args:
            call: what is chosen for; the device comes first.
            offer: gives the kind of device, and what to time by what it is a run of; asked for once a call. Nothing
                that a run changes may be seen. What serves without tuning comes first.
            like: one of the call's tensors; None forbids timing.

        Returns:
            One of what is offered, or None where nothing is remembered and nothing may be timed.
        """
        found = self._settled.get(call)
        if found is None:
            with torch.cuda.device(call[0]):  # whose clock times; of a CPU's -1, nothing happens
                kind, runs = offer()
                found = self._choose(self._store(kind), key(*call[1:]), runs, like)
            if found is not None:
                found = self._settled.setdefault(call, found)
        return found

    def _choose(self, store: Store, key: str, runs: Mapping[Any, Run], like: Tensor | None) -> Any:
        choices = {str(choice): choice for choice in runs}
        if store.choices.get(key) in choices:
            return choices[store.choices[key]]
        if len(runs) == 1:
            return next(iter(runs))
        if like is None or not may_time(like):
            return None
        times = {choice: time for choice, run in runs.items() if (time := milliseconds(run)) is not None}
        if not times:
            return next(iter(runs))  # for this process: there may be more memory in the next one
        if store.choices.get(key) not in choices:
            store.choices.pop(key, None)  # of candidates that there were once
        return choices[store.add(key, str(min(times, key=times.__getitem__)))]

    def _store(self, kind: str) -> Store:
        if kind not in self._stores:
            self._stores.setdefault(kind, Store(*_place(self.folder, kind)))
        return self._stores[kind]


class _State:
    tuner: Tuner | None = None


_STATE = _State()


def _switch(tuner: Tuner | None) -> None:
    _STATE.tuner = tuner
    forget()  # records have tiles in them


def active() -> Tuner | None:
    """What measures now, or None.

    Example:
        >>> active() is None
        True
    """
    return _STATE.tuner


@cache
def _tuner(folder: Path) -> Tuner:
    return Tuner(folder)


def folder(cache: str | os.PathLike[str] | None) -> Path:
    """Where choices are kept.

    Args:
        cache: as for `autotune`.

    Returns:
        The folder, which need not exist yet.

    Raises:
        TypeError: `cache` is no path.
        ValueError: it is not a folder, or there is no home folder to have one in.

    Example:
        >>> folder("somewhere").name
        'somewhere'
    """
    chosen = cache if cache is not None else os.environ.get("SAFE_KERNELS_CACHE") or "~/.cache/safe_kernels"
    try:
        found = Path(chosen).expanduser().absolute()
    except TypeError:
        raise TypeError(f"cache must be the path of a folder or None, got {type(cache).__name__}") from None
    except RuntimeError:
        raise ValueError("cache must be given, since there is no home folder to keep one in; got None") from None
    if found.exists() and not found.is_dir():
        raise ValueError(f"cache must be a folder, got the file {found}")
    return found


def remembered(cache: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """How many choices there are that would be taken now.

    Args:
        cache: as for `autotune`.

    Returns:
        Their number, by kind of device.

    Example:
        >>> remembered("/an/empty/folder")
        {}
    """
    where = folder(cache)
    devices = [path.stem.removeprefix("autotune-") for path in sorted(where.glob("autotune-*.json"))]
    counts = {device: len(Store(*_place(where, device)).choices) for device in devices}
    return {device: count for device, count in counts.items() if count}


def _place(folder: Path, device: str) -> tuple[Path, dict[str, str]]:
    import triton

    return folder / f"autotune-{device}.json", {"device": device, "triton": triton.__version__, "code": _code()}


@cache
def _code() -> str:
    """What the kernels and their candidates are: a change of either makes old choices worthless."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def bucket(size: Sequence[int]) -> tuple[int, ...]:
    """Sizes that count as one: the powers of two above them.

    Args:
        size: of a problem.

    Example:
        >>> bucket((8000, 4096, 5))
        (8192, 4096, 8)
    """
    return tuple(1 << max(number - 1, 0).bit_length() for number in size)


def key(kernel: str, size: Sequence[int], *rest: object) -> str:
    """What a choice is remembered under.

    Args:
        kernel: its name.
        size: of the problem.
        rest: whatever else matters; False is nothing.

    Returns:
        One line.

    Example:
        >>> key("lora_apply", (8192, 4096, 16), torch.bfloat16, "ieee", False)
        'lora_apply 8192x4096x16 bfloat16 ieee'
    """
    words = (str(item).removeprefix("torch.") for item in rest if item is not False)
    return " ".join([kernel, "x".join(map(str, size)), *words])


def may_time(like: Tensor) -> bool:
    """Whether a call may be timed now: there is a device that runs it, and nothing records what runs.

    Args:
        like: one of the call's tensors.
    """
    if like.is_meta or isinstance(like, FakeTensor) or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def milliseconds(run: Run) -> float | None:
    """The median time of a run on the current device, its cache flushed before each.

    Args:
        run: what to time.

    Returns:
        Milliseconds, or None if the device cannot run it, or not now.
    """
    from triton.runtime.errors import TritonError
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
    except (TritonError, torch.OutOfMemoryError):
        return None
