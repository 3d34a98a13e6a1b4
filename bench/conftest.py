"""Records the hardware and versions of a benchmark, without names of machines or people, and filters its JSON."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    """Return the processor's name from the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Keep only the facts that explain a result."""
    machine_info.clear()
    machine_info["cpu"] = cpu_model()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["python"] = platform.python_version()
    machine_info |= {name: version(name) for name in ("torch", "transformers", "peft", "safe-kernels")}


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keep quantiles instead of every single time."""
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    for benchmark in output_json["benchmarks"]:
        times = sorted(benchmark["stats"].pop("data", []))
        pick = {f"p{q}": times[min(len(times) - 1, round(q / 100 * (len(times) - 1)))] for q in (20, 50, 80)}
        benchmark["stats"] = {"rounds": len(times), **pick} if times else {}
        for name in ("options", "fullname", "group"):
            benchmark.pop(name, None)
