"""What a figure was measured on, and how: device, versions, clocks, ceilings; medians of timed runs."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel")
Run = Callable[[], Any]


def arguments(description: str) -> argparse.Namespace:
    """What every script here takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes: times mean nothing")
    parser.add_argument("--small", action="store_true", help="few small cases, for a sanitizer")
    parser.add_argument("--autotune", action="store_true", help="tiles by measurement; of kernels, our own alone")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    return parser.parse_args()


def device_of(options: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if options.dry_run else "cuda")


def write(options: argparse.Namespace, content: Any) -> None:
    options.out.write_text(json.dumps(content, indent=1))


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """GPU, driver, clocks, versions and date; no name of a machine."""
    facts: dict[str, Any] = {"date": datetime.date.today().isoformat(), "versions": package_versions()}
    if device.type == "cpu":
        return facts | {"gpu": "none (dry run)"}
    properties = torch.cuda.get_device_properties(device)
    facts["gpu"] = properties.name
    facts["capability"] = f"{properties.major}.{properties.minor}"
    facts["multiprocessors"], facts["memory_GiB"] = properties.multi_processor_count, properties.total_memory / 2**30
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        facts |= dict(zip(query.split(","), map(str.strip, answer.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        facts["driver_version"] = "nvidia-smi does not answer"
    return facts


def median_ms(
    run: Run, device: torch.device, grads: Sequence[torch.Tensor] = (), budget_ms: int = 120
) -> dict[str, float]:
    """Quantiles of a run's time in milliseconds; before each the cache is flushed, gradients are forgotten."""
    if device.type == "cuda":
        from triton.testing import do_bench

        low, middle, high = do_bench(run, warmup=40, rep=budget_ms, grad_to_none=list(grads), quantiles=[0.2, 0.5, 0.8])
        return {"p20": low, "p50": middle, "p80": high}
    times = []
    for _ in range(3):
        for tensor in grads:
            tensor.grad = None
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    low, middle, high = sorted(times)
    return {"p20": low, "p50": middle, "p80": high}


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes a second of a large copy, and FLOPs a second of a large bf16 product of random numbers."""
    size = 2**20 if device.type == "cpu" else 2**30
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), device)["p50"]
    width = 256 if device.type == "cpu" else 8192
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: a @ b, device, budget_ms=300)["p50"]
    return {"copy_GB_s": 2 * size / copy / 1e6, "bf16_TFLOP_s": 2 * width**3 / product / 1e9}
