"""Runs a function of a test in several processes that form a group, and hands back what each returned."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import forks
import torch

LIMIT = 90
"""Seconds after which a group counts as hung; gloo itself gives up sooner."""


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
        calls = [(function, rank, world, f"{folder}/store", gloo_seconds, each, args) for rank in range(world)]
        ended = forks.call_each(_work, calls, LIMIT * (len(args[0]) if each else 1))
    return [(one.value, one.error or None) for one in ended]


def _work(
    function: Callable[..., Any], rank: int, world: int, store: str, seconds: float, each: bool, args: Any
) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "true"}  # as torchrun does
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    return [function(rank, *case) for case in args[0]] if each else function(rank, *args)


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
