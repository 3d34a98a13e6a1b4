"""Compiles the kernels of the checks and the ops on all cores: each process makes its share of the calls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from gpu_cases import large_cases, small_cases
from gpu_checks import run

from .machine import arguments, device_of
from .ops import OWN, all_cases
from .results import seconds_left

PROCESSES = 12


def calls(dry: bool, device: torch.device) -> Iterator[Callable[[], Any]]:
    """Yield every call of our ops once. The calls of torch.compile are left out."""
    yield from (partial(run, case, device) for case in small_cases())
    for timed in all_cases(dry, device):
        yield from (timed.runs[provider] for provider in OWN if provider in timed.runs)
    yield from (partial(run, case, device) for case in large_cases() if not dry)


def warm(dry: bool, device: torch.device, shard: int, shards: int) -> None:
    """Make one share of the calls. Errors are ignored here, because they occur again in the checks."""
    for index, call in enumerate(calls(dry, device)):
        if index % shards == shard and seconds_left() > 0:
            with suppress(Exception):
                call()


def main() -> None:
    options = arguments(__doc__ or "")
    if options.shard:
        torch.set_num_threads(1)
        device = torch.device("cpu" if options.dry_run else "cuda")
        warm(options.dry_run, device, *options.shard)
        return
    device_of(options)
    processes = min(PROCESSES, os.cpu_count() or 1)
    shards = [("--shard", str(shard), str(processes)) for shard in range(processes)]
    running = [subprocess.Popen([sys.executable, "-m", "bench.gpu.warm", *sys.argv[1:], *shard]) for shard in shards]
    sys.exit(max(abs(process.wait()) for process in running))


if __name__ == "__main__":
    main()
