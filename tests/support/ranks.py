"""Runs a function of a test in several processes that form a group, and hands back what each returned.

The processes are forked from a server that has imported everything once, so that a group costs a fraction of a second.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

LIMIT = 90
"""Seconds after which a group counts as hung; gloo itself gives up sooner."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pytest",
        "accelerate",
        "safe_peft.callback",
        "transformers.models.bert.modeling_bert",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.profiler",
    ]
)


def together(function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """Call `function(rank, *args)` in processes 0 .. world - 1 of a gloo group.

    Args:
        function: at the top level of a test's file; it returns plain values.
        args: plain values.
        options: of `outcomes_of`: how many processes, and how many seconds one waits for another.

    Returns:
        What each returned, by rank.

    Raises:
        AssertionError: One failed or hung; the message has every traceback.
    """
    outcomes = outcomes_of(function, *args, **options)
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
    assert not failed, "\n".join(failed)
    return [value for value, _ in outcomes]


def each_together(function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Call it with each of several arguments in one group: what each case returned, by rank."""
    return [list(case) for case in zip(*together(function, list(cases), each=True), strict=True)]


def outcomes_of(
    function: Callable[..., Any], *args: Any, world: int = 2, gloo_seconds: float = 20, each: bool = False
) -> list[tuple[Any, str | None]]:
    """The same, with each process's result and traceback; a process that died or hung says so in its place."""
    with tempfile.TemporaryDirectory() as folder:
        place = (function.__code__.co_filename, function.__name__, f"{folder}/store", gloo_seconds, each)
        pipes = [_context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            _context.Process(target=_work, args=(sender, rank, world, place, args), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        deadline = time.monotonic() + LIMIT * (len(args[0]) if each else 1)
        try:
            return [_receive(reader, deadline) for reader, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()


def _receive(reader: Connection, deadline: float) -> tuple[Any, str | None]:
    try:
        if reader.poll(max(0.0, deadline - time.monotonic())):
            return reader.recv()
    except EOFError:
        return None, "died"
    return None, "hung"


def _work(sender: Connection, rank: int, world: int, place: tuple[str, str, str, float, bool], args: Any) -> None:
    path, name, store, seconds, each = place
    gc.freeze()  # or a collection would write to, and so copy, all that was imported before the fork
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}  # as torchrun does
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
        )
        call = getattr(module, name)
        outcome = [call(rank, *case) for case in args[0]] if each else call(rank, *args), None
    except BaseException:
        outcome = None, traceback.format_exc()
    sender.send(outcome)
    sender.close()


def mend_versions() -> None:
    """What keeps older releases from resuming on several processes, with or without us."""
    # accelerate calls the CPU "cpu:0" in several processes, and torch 2.11 cannot load what is to go there
    torch.serialization.register_package(
        30, lambda _: None, lambda obj, place: obj if place.startswith("cpu:") else None
    )
    # PEFT up to 0.20 imports this name to load an adapter, and transformers 5.17 has it no longer
    if importlib.util.find_spec("transformers.integrations.tensor_parallel") is not None:
        module = importlib.import_module("transformers.integrations.tensor_parallel")
        if not hasattr(module, "EmbeddingParallel"):
            module.EmbeddingParallel = type("EmbeddingParallel", (), {})
