"""Optional tuning by measurement: the tiles of a kernel, and whether the fused form is faster.

`triton.autotune` cannot make these choices. It chooses inside a launch, but here results are allocated before the
launch, and their size depends on the tiles (the number of parts of a sum). Some candidates are not tiles of a kernel,
but a product of the vendor's library, or another op. `triton.autotune` cannot be switched off: it times even a single
candidate, also while a CUDA graph is captured, and a candidate that runs out of memory fails the call.

Triton is imported only when something is measured.
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
    """Lets the Triton kernels measure which tiles are fastest for a call, instead of reading them from a table.

    A function and a context manager, like `torch.set_grad_enabled`. It is off by default. It applies to the whole
    process, since backward runs in its own threads. While it is on, the first call of a kernel with a new size (rounded
    up to powers of two), rank, dtype and kind of GPU times a few configurations on its arguments. This takes some
    tenths of a second, once. The process remembers the fastest, and a file keeps it for the next process. In the same
    way it chooses between `lora_linear` (layer and adapter fused) and `lora` over cuBLAS.

    Results, random numbers and statistics do not change. Timing needs up to 256 MB to flush the GPU's cache, and a
    candidate that does not fit in memory is skipped. Nothing is measured while a CUDA graph is captured, under tracing,
    or on a CPU; such calls use the remembered choice, or the table.

    Tiles decide in which order numbers are added. Within a process, repeated calls give the same bits. Two processes
    (also two ranks of one training) may choose different tiles and differ in the last bits, unless they share the file.

    Args:
        enabled: whether to measure from now on.
        cache: folder for the file; None: $SAFE_KERNELS_CACHE, or ~/.cache/safe_kernels.

    Raises:
        TypeError: `enabled` is not a bool, or `cache` is not a path.
        ValueError: `cache` is not a folder, or is None and there is no home folder.

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
    """Times candidates, and remembers the fastest in a folder with one file per kind of device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stores: dict[str, Store] = {}
        self._settled: dict[Call, Any] = {}

    def choose(self, call: Call, offer: Offer, like: Tensor) -> Any:
        """The fastest candidate, or None if nothing is remembered and nothing may be timed.

        Args:
            call: identifies the kind of call; the device is first.
            offer: returns the kind of device, and a run for each candidate; called once per kind of call. A run must
                have no visible effect. The choice without tuning is first.
            like: one of the call's tensors.
        """
        found = self._settled.get(call)
        if found is None:
            with torch.cuda.device(call[0]):  # its clock times the runs; -1 (a CPU) changes nothing
                kind, runs = offer()
                found = self._choose(self._store(kind), key(*call[1:]), runs, like)
            if found is not None:
                found = self._settled.setdefault(call, found)
        return found

    def _choose(self, store: Store, key: str, runs: Mapping[Any, Run], like: Tensor) -> Any:
        choices = {str(choice): choice for choice in runs}
        if store.choices.get(key) in choices:
            return choices[store.choices[key]]
        if len(runs) == 1:
            return next(iter(runs))
        if not may_time(like):
            return None
        times = {choice: time for choice, run in runs.items() if (time := milliseconds(run)) is not None}
        if not times:
            return next(iter(runs))  # not stored: the next process may have more memory
        if store.choices.get(key) not in choices:
            store.choices.pop(key, None)  # of a former candidate
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
    forget()  # records contain tiles


def active() -> Tuner | None:
    """The current tuner, or None."""
    return _STATE.tuner


@cache
def _tuner(folder: Path) -> Tuner:
    return Tuner(folder)


def folder(cache: str | os.PathLike[str] | None) -> Path:
    """The folder in which choices are kept, which need not exist yet; `cache` is as for `autotune`."""
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
    """The number of remembered choices that are valid now, by kind of device; `cache` is as for `autotune`."""
    where = folder(cache)
    devices = [path.stem.removeprefix("autotune-") for path in sorted(where.glob("autotune-*.json"))]
    counts = {device: len(Store(*_place(where, device)).choices) for device in devices}
    return {device: count for device, count in counts.items() if count}


def _place(folder: Path, device: str) -> tuple[Path, dict[str, str]]:
    import triton

    return folder / f"autotune-{device}.json", {"device": device, "triton": triton.__version__, "code": _code()}


@cache
def _code() -> str:
    """A digest of the kernels and their candidates: a change of either makes old choices invalid."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def bucket(size: Sequence[int]) -> tuple[int, ...]:
    """Rounds sizes up to powers of two; equal results share one choice.

    Example:
        >>> bucket((8000, 4096, 5))
        (8192, 4096, 8)
    """
    return tuple(1 << max(number - 1, 0).bit_length() for number in size)


def key(kernel: str, size: Sequence[int], *rest: object) -> str:
    """The line under which a choice is remembered; False in `rest` is ignored.

    Example:
        >>> key("lora_apply", (8192, 4096, 16), torch.bfloat16, "ieee", False)
        'lora_apply 8192x4096x16 bfloat16 ieee'
    """
    words = (str(item).removeprefix("torch.") for item in rest if item is not False)
    return " ".join([kernel, "x".join(map(str, size)), *words])


def may_time(like: Tensor) -> bool:
    """Whether a call may be timed now: a device runs it, and nothing captures or traces it."""
    if like.is_meta or isinstance(like, FakeTensor) or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def milliseconds(run: Run) -> float | None:
    """The median time of a run, with the cache flushed before each run; None if the device cannot run it now."""
    from triton.runtime.errors import TritonError
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
    except (TritonError, torch.OutOfMemoryError):
        return None
