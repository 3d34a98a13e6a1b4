"""Calls that are repeated without Python, or inside a CUDA graph: they have the same bits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
import torch
from gpu_cases import Case, without_weight
from torch import Tensor

from safe_kernels import _C
from safe_kernels.triton.lib import skinny_matmul

pytestmark = pytest.mark.gpu
BOTH = pytest.mark.parametrize("case", list(without_weight()), ids=str)
without_cache = pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="a capture cannot allocate without torch's cache"
)


def step(call: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    out = call()
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def forbidden(*args: object, **options: object) -> None:
    raise AssertionError("a call that has a launch record asked Python")


@BOTH
def test_a_second_call_does_without_python(case: Case, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, and in a thread and on a stream of its own."""
    placed, later = case.place(gpu), []
    first = step(*placed)
    torch.cuda.synchronize(gpu)
    with monkeypatch.context() as patch:
        patch.setattr(skinny_matmul, "launch", forbidden)
        again = step(*placed)
    assert _C.record_counts()["lora"] + _C.record_counts()["lora_linear"] > 0
    stream = torch.cuda.Stream(gpu)

    def work() -> None:
        # Python is not forbidden here: a thread without a context asks it once.
        with torch.cuda.device(gpu), torch.cuda.stream(stream):
            later.extend(step(*placed))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize(gpu)
    for other in (again, later):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@without_cache
@BOTH
def test_a_cuda_graph_reads_what_is_there_now(case: Case, gpu: torch.device) -> None:
    """Forward and backward captured once and replayed, against the calls themselves."""
    call, leaves = case.place(gpu)
    side = torch.cuda.Stream(gpu)
    side.wait_stream(torch.cuda.current_stream(gpu))
    with torch.cuda.stream(side):  # compiles, which a capture forbids
        step(call, leaves)
    torch.cuda.current_stream(gpu).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(call, leaves)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    for result, expected in zip(captured, step(call, leaves), strict=True):
        assert torch.equal(result, expected)
