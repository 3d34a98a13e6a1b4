"""Builds and loads tests/triton/libcuda.c in the place of CUDA's driver. Triton is not needed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

WATCHER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
"""What is told of a launch: function, grid, threads, shared memory, stream, addresses of the arguments."""


def load() -> tuple[ctypes.CDLL, Path]:
    """The library, which code that looks for libcuda.so.1 finds from now on, and its folder it lies in."""
    folder = Path(tempfile.mkdtemp(prefix="stub-driver-"))
    library = folder / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    source = str(Path(__file__).with_name("libcuda.c"))
    # A compiler is no place for a sanitizer's runtime.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([*command, source, "-Wl,-soname,libcuda.so.1", "-o", str(library)], check=True, env=environment)
    (folder / "libcuda.so").symlink_to(library.name)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL), folder
