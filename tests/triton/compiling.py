"""Compiles Triton kernels for GPUs that are not there, and reads from the result what they will ask of them.

A host function is called with tensors on the meta device, whose shapes, strides and dtypes are those of a real call and
whose memory does not exist; what it launches is compiled for the target with exactly the arguments a real call has,
and not run. A stand-in for Triton's driver answers which GPU is there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas
from triton.runtime.jit import JITFunction

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""KiB of shared memory a program may have (CUDA programming guide, compute capabilities; CDNA 3 ISA: LDS)."""
TENSOR_MEMORY_COLUMNS = 512
REGISTERS = {"cuda": 255, "hip": 512}
THREADS = {"sm_80": 2048, "sm_86": 1536, "sm_89": 1536, "sm_90": 2048, "sm_100": 2048, "gfx942": 2048}
REGISTER_FILE = {target: 4 * 64 * 512 if target == "gfx942" else 64 * 1024 for target in SHARED_KIB}
"""What a multiprocessor has for all of its programs (same sources)."""
BANDWIDTH_BOUND = ("_lora_sweep_kernel", "_lora_apply_kernel", "_lora_input_kernel", "_reduce_kernel")


class FakeDriver:
    """As much of a Triton driver as compiling needs; no device is ever touched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = self
        self.launcher_cls = None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of Triton's caches: one a target

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        name = next(name for name, target in TARGETS.items() if target is self.target)
        return {"max_shared_mem": SHARED_KIB[name] * 1024, "multiprocessor_count": 132, "warpSize": 32}

    @classmethod
    def is_active(cls) -> bool:
        return True


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel asks of a GPU.

    Attributes:
        kernel: its name.
        target: what it was compiled for.
        warps: warps a program.
        registers: registers a thread.
        shared: bytes of shared memory a program.
        tensor_memory: columns of tensor memory, which sm_100 has.
        spilled: bytes (AMD: registers) that did not fit into registers.
        tensor_core: instructions for matrix units, by name.
        dots: how many products of tiles the kernel has.
        serialized: whether the compiler waits for each wgmma before the next.
    """

    kernel: str
    target: str
    warps: int
    registers: int
    shared: int
    tensor_memory: int
    spilled: int
    tensor_core: str
    dots: int
    serialized: bool

    @property
    def programs(self) -> int:
        """How many run at a time on one multiprocessor, as far as registers and shared memory go."""
        threads, registers = self.warps * TARGETS[self.target].warp_size, -(-self.registers // 8) * 8
        reserved = 0 if self.target == "gfx942" else 1024
        fits = [THREADS[self.target] // threads, REGISTER_FILE[self.target] // (registers * threads)]
        if self.shared + reserved:
            fits.append((SHARED_KIB[self.target] * 1024 + reserved) // (self.shared + reserved))
        return min(fits)


@contextmanager
def collecting(target: str) -> Iterator[list[Any]]:
    """Makes launches compile for `target` instead, and lists what was compiled; a cubin is what ptxas says about it."""
    compiled: list[Any] = []
    run, make_cubin, cache = JITFunction.run, CUDABackend.make_cubin, knobs.cache.dir

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in compiled:
            compiled.append(kernel)
        return kernel

    triton.runtime.driver.set_active(FakeDriver(TARGETS[target]))
    JITFunction.run, CUDABackend.make_cubin = compile_only, _log_of_ptxas
    knobs.cache.dir = str(Path(cache, "logs_of_ptxas"))  # Triton must not find a log where a cubin belongs
    try:
        yield compiled
    finally:
        JITFunction.run, CUDABackend.make_cubin, knobs.cache.dir = run, make_cubin, cache


def compile_call(target: str, call: Callable[[], Any]) -> list[Resources]:
    """What the kernels that a call launches ask of a target."""
    with collecting(target) as compiled:
        call()
    return [resources(kernel, target) for kernel in compiled]


def cells(case: str, found: Resources) -> tuple[str, ...]:
    """A row of the table that is printed at the end."""
    shared = f"{found.shared / 1024:.1f}"
    numbers = (found.warps, found.programs, found.registers, shared, found.tensor_memory, found.spilled)
    return (found.kernel, case, found.target, *map(str, numbers), found.tensor_core)


def problems(found: Resources, exact: bool) -> list[str]:
    """What keeps a kernel from running well on its target; `exact` float32 products have no matrix units on CUDA."""
    backend = TARGETS[found.target].backend
    has_units = found.dots > 0 and not (exact and backend == "cuda") and found.kernel != "_block_sums_kernel"
    is_sweep = found.kernel in BANDWIDTH_BOUND
    wrong = {
        "spills": found.spilled > 0,
        "registers": found.registers > REGISTERS[backend],
        "shared memory": found.shared > SHARED_KIB[found.target] * 1024,
        "tensor memory": found.tensor_memory > TENSOR_MEMORY_COLUMNS,
        "no matrix units": has_units and not found.tensor_core,
        "serialized": found.serialized,
        "too few warps at a time to read while others wait": is_sweep and found.programs * found.warps < 8,
    }
    return [f"{found.kernel} on {found.target}: {name} ({found})" for name, is_wrong in wrong.items() if is_wrong]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def resources(kernel: Any, target: str) -> Resources:
    """Reads a compiled kernel."""
    metadata = kernel.metadata
    read = _read_nvidia if "cubin" in kernel.asm else _read_amd
    return Resources(
        kernel=metadata.name,
        target=target,
        warps=metadata.num_warps,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        dots=len(re.findall(r"\btt\.dot\b", kernel.asm["ttir"])),
        **read(kernel),
    )


def hottest_loop(kernel: Any) -> int:
    """How many instructions the longest loop of a CUDA kernel has."""
    return instructions(kernel)[0]


def instructions(kernel: Any) -> tuple[int, int]:
    """How many instructions the longest loop of a CUDA kernel has, 0 without one; and the whole kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        _run_ptxas(kernel.asm["ptx"], kernel.metadata.target.arch, cubin)
        code = _run(str(NVIDIA_TOOLS / "cuobjdump"), "-sass", str(cubin))
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    lines = [(int(address, 16), text) for address, text in found if "NOP" not in text]
    jumps = [(re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text), at) for at, text in lines]
    loops = [(int(jump[1], 16), at) for jump, at in jumps if jump and int(jump[1], 16) < at]
    longest = max((sum(first <= at <= last for at, _ in lines) for first, last in loops), default=0)
    return longest, len(lines)


def _log_of_ptxas(backend: CUDABackend, ptx: str, metadata: Any, options: Any, capability: int) -> bytes:
    """In place of Triton's call, which throws away the log: it alone tells spills, and that wgmma was serialized."""
    with tempfile.TemporaryDirectory() as folder:
        return _run_ptxas(ptx, capability, Path(folder, "kernel.cubin")).encode()


def _run_ptxas(ptx: str, capability: int, cubin: Path) -> str:
    source = cubin.with_suffix(".ptx")
    source.write_text(ptx)
    name = f"sm_{capability}{'a' if capability >= 90 else ''}"
    return _run(_ptxas(capability), "-v", f"--gpu-name={name}", str(source), "-o", str(cubin))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _ptxas(capability: int) -> str:
    try:
        return str(get_ptxas(capability).path)
    except TypeError:
        return str(get_ptxas().path)


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    log = kernel.asm["cubin"].decode()
    spilled = re.search(r"(\d+) bytes spill stores", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spilled and registers, log
    products = re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.", kernel.asm["ptx"])
    return {
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
        "tensor_core": _counts([name.split(".")[0] for name in products]),
        "serialized": "serializ" in log,
    }


def _read_amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        assert found, key
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count"),
        "tensor_core": _counts(re.findall(r"\bv_(mfma|smfmac)_\w+", code)),
        "serialized": False,
    }


def _counts(names: list[str]) -> str:
    return " ".join(f"{name.upper()} {names.count(name)}" for name in sorted(set(names)))
