"""Triton's own launcher over a driver that runs nothing: what is launched, and with which arguments, can be seen.

Kernels are compiled for sm_90 and "loaded"; tensors lie on the CPU, whose addresses are as good as any.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from stub_library import WATCHER, load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from safe_kernels.triton import STEMS, host_function, register_replayed
from safe_kernels.triton.runtime.launch_replay import parameter_bytes

KEY = "XPU"
"""The ops are served where no tensor of these tests would look for them, and called there by name."""


class Launch(NamedTuple):
    """What the driver was asked for."""

    function: int
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    values: tuple[int, ...]


class Made(NamedTuple):
    """A tensor that was allocated during a call."""

    tensor: Tensor
    launches: int


class Watch(TorchDispatchMode):
    """Sees a call's allocations, all of which it keeps alive, its launches, and the products that PyTorch adds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default):
            self.made.append(Made(result, len(self.launches)))
        if func is torch.ops.aten.addmm_.default:  # a step of records, too: the library's product
            views = tuple(number for matrix in args for number in (*matrix.shape, *matrix.stride()))
            self.launches.append(Launch(0, views, 0, 0, 0, tuple(matrix.data_ptr() for matrix in args)))
        return result


class Stub:
    """The driver, and the ops served over it."""

    def __init__(self) -> None:
        self.library, folder = load()
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.watch: Watch | None = None
        self._watcher = WATCHER(self._launched)
        self.library.watch(self._watcher)
        self.driver = self._driver()
        for op in (op for ops in STEMS.values() for op in ops):
            register_replayed(op, KEY)

    @staticmethod
    def _driver() -> Any:
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

        class Driver(CudaDriver):
            def __init__(self) -> None:
                self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", 90, 32)

            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: Any = None) -> int:
                return 0

            def get_device_capability(self, device: Any = 0) -> tuple[int, int]:
                return (9, 0)

        return Driver()

    def _launched(self, function: int, grid: Any, threads: int, shared: int, stream: int, parameters: Any) -> None:
        if self.watch is None:
            return
        sizes = _sizes(function)
        values = tuple(int.from_bytes(ctypes.string_at(parameters[i], size), "little") for i, size in enumerate(sizes))
        self.watch.launches.append(Launch(function, tuple(grid[:3]), threads, shared, stream or 0, values))

    def watched(self, call: Callable[[], Any]) -> tuple[Any, Watch]:
        """Result and traces of a call."""
        triton.runtime.driver.set_active(self.driver)
        self.watch = Watch()
        try:
            with self.watch:
                result = call()
            return result, self.watch
        finally:
            self.watch = None

    def dispatched(self, op: str, *args: Any) -> Any:
        """Calls an op as the dispatcher would."""
        triton.runtime.driver.set_active(self.driver)
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))
        return getattr(torch.ops.safe_kernels, op).default.redispatch(keys, *args)

    def hosted(self, op: str, *args: Any) -> Any:
        """Calls an op's host function."""
        triton.runtime.driver.set_active(self.driver)
        return host_function(op)(*args)


@cache
def stub() -> Stub:
    """The one of this process."""
    return Stub()


def _sizes(function: int) -> list[int]:
    """Of the parameters of a kernel that has been loaded."""
    for kernel in _kernels():
        for compiled in kernel.device_caches[0][0].values():
            if compiled.function == function:
                return parameter_bytes(compiled.asm["ptx"])
    raise AssertionError("a kernel that Triton has not loaded")


@cache
def _kernels() -> list[Any]:
    package = importlib.import_module(host_function.__module__)
    names = (found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
    modules = [importlib.import_module(name) for name in names]
    found = {id(value): value for module in modules for value in vars(module).values()}
    return [value for value in found.values() if isinstance(value, triton.JITFunction)]


def traces(watch: Watch, inputs: list[Tensor]) -> list[tuple[Any, ...]]:
    """Launches with addresses as places in inputs and in tensors made, the latter in the order they are met."""
    met: list[int] = []

    def place(value: int) -> Any:
        for index, tensor in enumerate(inputs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() <= value < storage.data_ptr() + storage.nbytes():
                return "input", index, value - storage.data_ptr()
        for index, (tensor, _) in enumerate(watch.made):
            if tensor.data_ptr() <= value < tensor.data_ptr() + tensor.nbytes:
                met.extend([index] if index not in met else [])
                return "made", met.index(index), tuple(tensor.shape), tensor.dtype, value - tensor.data_ptr()
        return value

    return [(*launch[:-1], tuple(place(value) for value in launch.values)) for launch in watch.launches]
