"""Makes Triton's interpreter notice what a GPU would not forgive: access outside a tensor, and programs that collide.

Every load, store and atomic must lie inside a tensor the launch was given; no two programs may write one address,
none may read what another has written; programs run in a shuffled order, so that nothing depends on it; and a grid
must be one that CUDA launches.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

MOST_ACROSS = 65535


@dataclass
class Launch:
    """What is known about the launch that runs.

    Attributes:
        begins: first addresses of the tensors' extents, ascending.
        ends: the addresses behind them.
        writer: which program wrote an address.
        order: the programs, shuffled; made when the grid is known.
        accesses: elements read and written.
    """

    begins: np.ndarray
    ends: np.ndarray
    writer: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    accesses: int = 0


launch: Launch | None = None
launches: list[str] = []
"""The kernels launched since the list was last cleared."""


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes between a tensor's first element and its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def merged(extents: list[tuple[int, int]]) -> Launch:
    """Extents of several views of one storage become one."""
    joined: list[list[int]] = []
    for begin, end in sorted(extents):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    begins, ends = zip(*joined, strict=True) if joined else ((), ())
    return Launch(np.array(begins, np.uint64), np.array(ends, np.uint64))


def check(kind: str, pointers: TensorHandle, mask: TensorHandle, program: tuple[int, int, int], grid: Any) -> None:
    """Fails unless an access is inside a tensor and collides with no other program's."""
    if launch is None:
        return
    shape = np.broadcast_shapes(np.shape(pointers.data), np.shape(mask.data))
    addresses = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape)]
    if not addresses.size:
        return
    launch.accesses += addresses.size
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    which = np.searchsorted(launch.begins, addresses, side="right") - 1
    outside = (which < 0) | (addresses + np.uint64(size) > launch.ends[np.maximum(which, 0)])
    if outside.any():
        raise IndexError(f"{kind} outside every tensor: {outside.sum()} of {addresses.size} lanes, program {program}")
    collide(kind, addresses, (program[0] * grid[1] + program[1]) * grid[2] + program[2])


def collide(kind: str, addresses: np.ndarray, program: int) -> None:
    """Fails if another program has written an address; remembers the writer."""
    assert launch is not None
    writer = launch.writer
    if kind == "load":
        others = [a for a in addresses.tolist() if writer.get(a, program) != program] if writer else []
        if others:
            raise RuntimeError(f"race: program {program} reads what program {writer[others[0]]} has written")
    elif kind == "store":
        if len(np.unique(addresses)) != addresses.size:
            raise RuntimeError(f"race: program {program} writes one address twice in one store")
        for address in addresses.tolist():
            if writer.setdefault(address, program) != program:
                raise RuntimeError(f"race: programs {writer[address]} and {program} write one address")


def loading(before: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **names: Any) -> TensorHandle:
        check("load", pointers, mask, self.grid_idx, self.grid_dim)
        return before(self, pointers, mask, *rest, **names)

    return load


def storing(before: Callable[..., Any]) -> Callable[..., Any]:
    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        check("store", pointers, mask, self.grid_idx, self.grid_dim)
        return before(self, pointers, value, mask, *rest)

    return store


def adding(before: Callable[..., Any]) -> Callable[..., Any]:
    def atomic(self: Any, op: Any, pointer: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> Any:
        raise RuntimeError("an atomic: results would depend on the order programs run in")

    return atomic


def beginning(before: Callable[..., Any]) -> Callable[..., Any]:
    def arguments(self: Any, args: Any, kwargs: Any) -> Any:
        global launch
        launches.append(self.fn.__name__)
        host_args, host_kwargs = before(self, args, kwargs)
        tensors = [value for value in (*host_args, *host_kwargs.values()) if isinstance(value, torch.Tensor)]
        launch = merged([extent(tensor) for tensor in tensors])
        return host_args, host_kwargs

    return arguments


def ordering(before: Callable[..., Any]) -> Callable[..., Any]:
    def choose(self: Any, x: int, y: int, z: int) -> None:
        if launch is not None:
            across, deep = self.grid_dim[1], self.grid_dim[2]
            if max(across, deep) > MOST_ACROSS:
                raise ValueError(
                    f"grid {self.grid_dim}: CUDA takes at most {MOST_ACROSS} programs but along the first axis"
                )
            if not launch.order:
                count = self.grid_dim[0] * across * deep
                launch.order = random.Random(count).sample(range(count), count)
            program = launch.order[(x * across + y) * deep + z]
            x, y, z = program // (across * deep), program // deep % across, program % deep
        before(self, x, y, z)

    return choose


def install() -> None:
    """Patches the interpreter of this process."""
    for owner, name, make in (
        (InterpreterBuilder, "create_masked_load", loading),
        (InterpreterBuilder, "create_masked_store", storing),
        (InterpreterBuilder, "create_atomic_rmw", adding),
        (InterpreterBuilder, "set_grid_idx", ordering),
        (GridExecutor, "_init_args_hst", beginning),
    ):
        setattr(owner, name, make(getattr(owner, name)))
    assert interpreter.InterpreterBuilder is InterpreterBuilder
