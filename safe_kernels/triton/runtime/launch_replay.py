"""Records the allocations and launches of a host function, so that C++ can replay them without Python.

A launch through Python takes tens of microseconds per kernel, longer than most kernels of an adapter run. The shapes,
strides, dtypes, alignments and numbers of the arguments decide the launches. So the first call of each kind is recorded
as a launch record, and csrc/launch_replay/ replays the record for every call like it, with the new addresses.

Host functions allocate through `empty`, launch through `launch`, and let PyTorch multiply through `multiply_add`. If
anything else makes an input of a kernel or a result (a copy of a tensor, a sum by PyTorch), the call has no record, and
its host function runs every time.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safe_kernels import _C

SWITCH = "SAFE_KERNELS_REPLAY"
"""Environment variable; with 0 every call runs its host function."""
NEVER = 2**63 - 1
BYTES = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "u32": 4, "fp32": 4, "i64": 8, "u64": 8}
"""Bytes of a kernel's parameter by Triton's name of its type; an address has 8."""
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[busf](8|16|32|64)\b")

Argument = tuple[int, int]
Launch = tuple[int, tuple[int, int, int], int, int, list[Argument]]
View = tuple[int, list[int], list[int], int]
Product = tuple[View, View, View]


class Unrecordable(Exception):
    """A record cannot represent this call."""


class Unreadable(Unrecordable):
    """This version of Triton compiles kernels in an unknown form, so no call can have a record."""


OBSTACLES: Counter[str] = Counter()
"""The reasons why calls have no record although they could, and the number of kinds of calls for each."""


class Allocation(NamedTuple):
    """A tensor that a call allocated (not kept alive), and the number of steps before it."""

    storage: StorageWeakRef
    address: int
    shape: list[int]
    dtype: torch.dtype
    first: int

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in this allocation. After it is freed, other tensors may get its address."""
        return not self.storage.expired() and self.storage.cdata == tensor.untyped_storage()._cdata


_LOADED: dict[int, Any] = {}
"""Compiled kernels by function: this keeps the kernels of records loaded."""


class Recorder:
    """Records one call with these tensor arguments."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self.allocations: list[Allocation] = []
        self.steps: list[Launch | Product] = []
        self.is_complete = True
        self.holds = True
        self.obstacle = ""

    def allocated(self, tensor: Tensor) -> None:
        """Records an allocation."""
        storage = StorageWeakRef(tensor.untyped_storage())
        shape, dtype, first = list(tensor.shape), tensor.dtype, len(self.steps)
        self.allocations.append(Allocation(storage, tensor.data_ptr(), shape, dtype, first))

    def launched(self, kernel: Any, compiled: Any, grid: Sequence[int], values: Sequence[Any]) -> None:
        """Records a launch."""
        if 0 in grid:
            return  # nothing runs
        with self._recording_step():
            if compiled is None:
                raise Unrecordable("the interpreter ran the kernel")
            if _is_watched():
                self.holds = False
                raise Unrecordable("a launch hook is set, and may be removed before the next call")
            self.steps.append(self._launch(kernel, compiled, grid, values))

    def multiplied(self, *matrices: Tensor) -> None:
        """Records a product that PyTorch has added to the first matrix."""
        with self._recording_step():
            out, left, right = map(self._view, matrices)
            self.steps.append((out, left, right))

    @contextmanager
    def _recording_step(self) -> Iterator[None]:
        """The kernel has already run; a failure to record it (as with a newer Triton) must not fail the call."""
        try:
            yield
        except Exception as error:
            self.is_complete = False
            if not isinstance(error, Unrecordable):
                self.obstacle = f"{type(error).__name__}: {error}"
            elif isinstance(error, Unreadable):
                self.obstacle = str(error)

    def record(self, result: Tensor | tuple[Tensor, ...]) -> _C.LaunchRecord | None:
        """The call's launch record, or None."""
        record = None
        with self._recording_step():
            results = [self._result(tensor) for tensor in (result if isinstance(result, tuple) else (result,))]
            if self.is_complete and len({tensor.device for tensor in self.inputs}) == 1:
                record = _C.LaunchRecord(list(self._lives(results)), self.steps, results)
        if self.obstacle:
            _tell(self.obstacle)
        return record

    def _lives(self, results: list[int]) -> Iterator[tuple[list[int], torch.dtype, int, int]]:
        """Each allocation's shape and dtype, the step before which it is made, the step after which it is freed."""
        used = [set(_tensors_of(step)) for step in self.steps]
        for index, made in enumerate(self.allocations, start=len(self.inputs)):
            uses = [number for number, tensors in enumerate(used) if index in tensors]
            is_result = index - len(self.inputs) in results
            if uses or is_result:
                yield made.shape, made.dtype, made.first, NEVER if is_result else uses[-1]
            else:
                yield [], made.dtype, NEVER, NEVER

    def _launch(self, kernel: Any, compiled: Any, grid: Sequence[int], values: Sequence[Any]) -> Launch:
        metadata, types = compiled.metadata, compiled.src.signature
        _require_plain(metadata)
        given = dict(zip(kernel.arg_names, values, strict=False))
        kinds = [(name, kind) for name, kind in types.items() if kind != "constexpr"]
        arguments = [self._argument(kind, given[name]) for name, kind in kinds]
        # Triton appends two addresses of scratch memory, which no kernel here uses.
        if "ptx" not in compiled.asm:
            raise Unreadable("Triton kept no PTX code (TRITON_STORE_BINARY_ONLY=1 leaves it out)")
        expected, found = [BYTES.get(kind, 8) for _, kind in kinds], parameter_bytes(compiled.asm["ptx"])
        if found != [*expected, 8, 8]:
            raise Unreadable("the parameters of Triton's kernel differ from its signature")
        x, y, z = (*grid, 1, 1)[:3]
        threads = metadata.num_warps * metadata.target.warp_size
        function = int(compiled.function)
        _LOADED[function] = compiled
        return function, (x, y, z), threads, metadata.shared, [*arguments, (-1, 0), (-1, 0)]

    def _argument(self, kind: str, value: Any) -> Argument:
        if kind.startswith("*"):
            return self._address(value)
        if kind not in BYTES:
            raise Unreadable(f"a kernel has a parameter of type {kind}")
        if kind == "fp32":
            return -1, int.from_bytes(bytes(ctypes.c_float(value)), "little")  # as C casts: too large becomes infinite
        return -1, int(value) % 2 ** (8 * BYTES[kind])

    def _address(self, tensor: Tensor) -> Argument:
        """A tensor's start: that of an input, or an offset into a storage of only one input or allocation."""
        address = tensor.data_ptr()
        if address == 0:
            return -1, 0
        for index, known in enumerate(self.inputs):
            if known.data_ptr() == address:
                return index, 0
        storage = tensor.untyped_storage().data_ptr()
        owners = [
            (index, known.data_ptr())
            for index, known in enumerate(self.inputs)
            if known.untyped_storage().data_ptr() == storage
        ]
        owners += [
            (index, made.address)
            for index, made in enumerate(self.allocations, start=len(self.inputs))
            if made.holds(tensor)
        ]
        if len(owners) != 1 or address < owners[0][1]:
            raise Unrecordable("a tensor of unknown origin")
        index, start = owners[0]
        return index, address - start

    def _view(self, matrix: Tensor) -> View:
        index, offset = self._address(matrix)
        return index, list(matrix.shape), list(matrix.stride()), offset // matrix.itemsize

    def _result(self, tensor: Tensor) -> int:
        for index, made in enumerate(self.allocations):
            if made.holds(tensor) and (made.shape, made.dtype) == (list(tensor.shape), tensor.dtype):
                return index
        raise Unrecordable("a result of unknown origin")


def _tensors_of(step: Launch | Product) -> Iterator[int]:
    """Numbers of the inputs and allocations that a step reads or writes; -1 for other arguments."""
    yield from (place[0] for place in (step[-1] if len(step) == 5 else step))


def _require_plain(metadata: Any) -> None:
    """Refuses a launch that needs more than a number of programs, threads and bytes."""
    special = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if metadata.target.backend != "cuda":
        raise Unrecordable("a GPU of another vendor")
    if metadata.num_ctas != 1 or any(getattr(metadata, s, 0) for s in special):
        raise Unreadable("Triton compiled a kernel for a special kind of launch")


def _is_watched() -> bool:
    """Whether a launch hook of Triton is set, for instance by a profiler."""
    from triton import knobs

    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(bool(getattr(hook, "calls", hook)) for hook in hooks)


def _tell(obstacle: str) -> None:
    """Counts an obstacle; warns of the first one, because such calls are correct but slow."""
    OBSTACLES[obstacle] += 1
    if OBSTACLES.total() == 1:
        fix = "Install the Triton that this PyTorch requires, and unset TRITON_STORE_BINARY_ONLY"
        warnings.warn(
            f"safe_kernels cannot record the launches of a call on a GPU: {obstacle}. Every such call runs in Python, "
            f"which takes about ten times the processor time. {fix}; or set {SWITCH}=0 to accept it.",
            RuntimeWarning,
            stacklevel=2,
        )


def parameter_bytes(ptx: str) -> list[int]:
    """Sizes of a kernel's parameters, read from its PTX code, which has one entry.

    Example:
        >>> parameter_bytes(".entry k(.param .u64 .ptr .global .align 1 k_0, .param .u32 k_1, .param .f32 k_2)")
        [8, 4, 4]
    """
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return [int(bits) // 8 for bits in PARAMETER.findall(entry[1])] if entry else []


class _State(threading.local):
    recorder: Recorder | None = None


_STATE = _State()


def recorded(host: Callable[..., Any]) -> Callable[..., tuple[Any, Any, bool]]:
    """Makes a host function also return its launch record or None, and whether that holds for all calls like it."""

    def record(*args: Any) -> tuple[Any, Any, bool]:
        if os.environ.get(SWITCH) == "0":
            return host(*args), None, True
        recorder = Recorder([value for value in args if isinstance(value, Tensor)])
        with _recording(recorder):
            result = host(*args)
        return result, recorder.record(result), recorder.holds

    return record


@contextmanager
def _recording(recorder: Recorder | None) -> Iterator[None]:
    before, _STATE.recorder = _STATE.recorder, recorder
    try:
        yield
    finally:
        _STATE.recorder = before


def unrecorded() -> Any:
    """A context in which nothing is recorded."""
    return _recording(None)


def may_change() -> None:
    """The current call may launch other kernels next time: it gets no record."""
    if _STATE.recorder is not None:
        _STATE.recorder.is_complete = _STATE.recorder.holds = False


def forget() -> None:
    """Drops all records, because something has changed that launches depend on."""
    _C.forget_records()


def empty(like: Tensor, shape: Sequence[int] | int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocates a contiguous tensor on the device of `like`, and in its dtype if `dtype` is None."""
    tensor = like.new_empty(shape, dtype=dtype)
    if _STATE.recorder is not None:
        _STATE.recorder.allocated(tensor)
    return tensor


def launch(kernel: Any, grid: Sequence[int], *values: Any, **constants: Any) -> None:
    """Launches a kernel with these arguments; `constants` are constexprs and options of the compiler."""
    compiled = kernel[grid](*values, **constants)
    if _STATE.recorder is not None:
        _STATE.recorder.launched(kernel, compiled, grid, values)


def multiply_add(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left right``, computed by PyTorch with the vendor's library; all three have one dtype."""
    if 0 in (*out.shape, left.shape[1]):
        return  # nothing is added
    out.addmm_(left, right)
    if _STATE.recorder is not None:
        _STATE.recorder.multiplied(out, left, right)
