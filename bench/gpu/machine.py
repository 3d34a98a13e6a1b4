"""The machine of a measurement: device, versions, clocks and peak rates; and medians of timed runs."""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .results import PARTS, read, reason, update

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel")
QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
Run = Callable[[], Any]


def arguments(description: str) -> argparse.Namespace:
    """Read the arguments of a script in this folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--shard",
        type=int,
        nargs=2,
        help="for warming: this share of the cases, of how many",
    )
    add_options(parser.add_argument)
    return parser.parse_args()


def add_options(add: Callable[..., Any]) -> None:
    """Add the arguments of every part."""
    add("--dry-run", action="store_true", help="run on the CPU, at tiny sizes whose times mean nothing")
    add("--autotune", action="store_true", help="choose tiles by measuring; times only our own ops")
    add("--out", type=Path, required=True, help="the JSON file to write to")
    add("--part", choices=PARTS, required=True, help="the name of the part in the file")


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device; its description is written to the file once."""
    device = torch.device("cpu" if options.dry_run else "cuda")
    if not read(options.out)["machine"]:
        update(options.out, "machine", describe(device))
    return device


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Return GPU, driver, clocks, versions and date, without the machine's name."""
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": package_versions()}
    if device.type == "cpu":
        return facts | {"gpu": "none (dry run)"}
    properties = torch.cuda.get_device_properties(device)
    facts["gpu"] = properties.name
    facts["capability"] = f"{properties.major}.{properties.minor}"
    facts["multiprocessors"], facts["memory_GiB"] = properties.multi_processor_count, properties.total_memory / 2**30
    return facts | ask_driver(properties)


def under_load(device: torch.device) -> dict[str, str]:
    """Return the clocks of the busy GPU: an idle GPU has lower clocks."""
    if device.type == "cpu":
        return {}
    busy = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(500):
        busy @ busy
    return ask_driver(torch.cuda.get_device_properties(device))


def ask_driver(properties: Any) -> dict[str, str]:
    """Of this very GPU: by its number nvidia-smi would find another one wherever CUDA_VISIBLE_DEVICES is set."""
    try:
        command = [
            "nvidia-smi",
            f"--id=GPU-{str(properties.uuid).removeprefix('GPU-')}",
            f"--query-gpu={QUERY}",
            "--format=csv,noheader",
        ]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return dict(zip(QUERY.split(","), map(str.strip, answer.splitlines()[0].split(",")), strict=True))
    except (AttributeError, OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        return {"driver_version": f"nvidia-smi does not answer: {reason(error)}"}


def median_ms(run: Run, device: torch.device, before: Run = lambda: None, budget_ms: float = 120) -> dict[str, float]:
    """Quantiles of a run's time in milliseconds.

    Args:
        run: what is timed.
        device: where it runs.
        before: not timed; called before each run, after which the cache is flushed as well.
        budget_ms: for how long, though at least 5 times; a third of that goes before it, to warm up.
    """
    timed = _cpu_ms if device.type == "cpu" else _Events(device)
    before()
    run()
    times = [timed(before, run) for _ in range(2)]
    repeats = 3 if device.type == "cpu" else int(min(max(budget_ms / max(times[-1], 1e-3), 5), 200))
    for _ in range(repeats // 3 if repeats > 5 else 0):
        timed(before, run)
    times = [timed(before, run) for _ in range(repeats)]
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": low, "p50": statistics.median(times), "p80": high, "runs": repeats}


def _cpu_ms(before: Run, run: Run) -> float:
    before()
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class _Events:
    """Times one run on a GPU by its own clock."""

    def __init__(self, device: torch.device) -> None:
        self.cache = torch.empty(2**28, dtype=torch.int8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, before: Run, run: Run) -> float:
        before()
        self.cache.zero_()
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def device_ms(run: Run, device: torch.device, before: Run = lambda: None) -> float:
    """The median time of the same work as a CUDA graph: what the GPU takes where no host makes it wait.

    Args:
        run: what is timed.
        device: a GPU.
        before: called before the work is captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            before()
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    before()
    with torch.cuda.graph(graph):
        run()
    return median_ms(graph.replay, device, budget_ms=40)["p50"]


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a large copy, and FLOPs per second of a large bf16 product of random numbers."""
    size = 2**20 if device.type == "cpu" else 2**30
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), device)["p50"]
    width = 256 if device.type == "cpu" else 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b, device, budget_ms=300)["p50"]
    return {"copy_GB_s": 2 * size / copy / 1e6, "bf16_TFLOP_s": 2 * width**3 / product / 1e9}
