"""Checks of more than one call's values: the mask's bits, scores, CUDA graphs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

import safe_kernels
from safe_kernels import _C, AdapterStatistics, RowBlocks
from safe_kernels.triton.lib import skinny_matmul

from .check_cases import HALF, SINGLE, SMALL, Case, fused, lora, normal, state

Check = Callable[[], list[str]]
CPU = torch.device("cpu")
TOLERANCE = {SINGLE: 1e-4, HALF: 2e-2}
"""Of a score, relative; in bf16 the features are rounded before they are compared."""


def whole_checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    yield "dropout's mask", partial(check_mask, device)
    for dtype, p, is_fused in product((SINGLE, HALF), (0.0, 0.1), (False, True)):
        kind = "lora_linear" if is_fused else "lora"
        yield f"score of {kind} {dtype} p{p}", partial(check_score, device, dtype, p, is_fused)
    if device.type == "cuda":
        over = lora(SMALL, HALF, HALF, 0.1)
        for case in (over, replace(fused(over), trained=(0, 2, 3))):
            yield f"replay of {case.name}", partial(check_replay, device, case)
    # A capture cannot allocate where the sanitizer has torch's cache switched off.
    if device.type == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        over = lora(SMALL, HALF, HALF, 0.1)
        # Not the weight: cuBLAS sums its gradient, and need not do so alike in a graph.
        for case in (over, replace(fused(over), trained=(0, 2, 3))):
            yield f"CUDA graph of {case.name}", partial(check_graph, device, case)


def check_replay(device: torch.device, case: Case) -> list[str]:
    """The second call does without Python, in a thread and on a stream of its own, and to the same bits."""
    call, leaves = case.place(device)

    def results() -> list[Tensor]:
        out = call()
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    first, later = results(), []
    torch.cuda.synchronize(device)
    launch, skinny_matmul.launch = skinny_matmul.launch, forbidden
    try:
        again, stream = results(), torch.cuda.Stream(device)

        def work() -> None:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                later.extend(results())

        if _C.plan_counts()["lora"] + _C.plan_counts()["lora_linear"] == 0:
            return ["no plan was made"]
        skinny_matmul.launch = launch  # a thread without a context asks Python once
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        torch.cuda.synchronize(device)
    finally:
        skinny_matmul.launch = launch
    same = all(torch.equal(a, b) for other in (again, later) for a, b in zip(first, other, strict=True))
    return [] if same else ["a replayed call has other bits"]


def forbidden(*args: object, **options: object) -> None:
    raise AssertionError("a call that has a plan asked Python")


def check_mask(device: torch.device) -> list[str]:
    """The dropout of one seed, bit for bit as on a CPU."""
    x, seed = torch.ones(777, 1234), state()
    masks = [safe_kernels.dropout(x.to(where), 0.5, rng_state=seed.to(where)).cpu() for where in (CPU, device)]
    return [] if torch.equal(*masks) else ["dropout's mask differs from the CPU's"]


def check_score(device: torch.device, dtype: torch.dtype, p: float, is_fused: bool) -> list[str]:
    """1 - CKA of one adapter, here and on a CPU."""
    x, base = normal(512, 256, dtype=dtype), normal(512, 300, dtype=dtype)
    weight = normal(300, 256, dtype=dtype, scale=0.06)
    A, B = normal(8, 256, dtype=dtype, scale=0.06), normal(300, 8, dtype=dtype, scale=0.1)
    counts, seed, scores = torch.arange(512) % 7 != 0, state(), []
    for where in (CPU, device):
        blocks = RowBlocks(torch.tensor([0, 200, 450]).to(where), 128, counts.to(where))
        statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64, device=where), blocks)
        x_, base_, weight_, A_, B_ = (tensor.to(where) for tensor in (x, base, weight, A, B))
        options = {"dropout_p": p, "rng_state": seed.to(where) if p else None, "statistics": statistics}
        if is_fused:
            safe_kernels.lora_linear(x_, weight_, None, A_, B_, 2.0, **options)
        else:
            safe_kernels.lora(x_, base_, A_, B_, 2.0, **options)
        scores.append(statistics.one_minus_cka())
    wrong = not abs(scores[0] - scores[1]) <= TOLERANCE[dtype] * scores[0]
    return [f"1 - CKA: {scores[1]}, on a CPU {scores[0]}"] if wrong else []


def check_graph(device: torch.device, case: Case) -> list[str]:
    """Forward and backward captured once and replayed, against the calls themselves."""
    call, leaves = case.place(device)

    def step() -> list[Tensor]:
        out = call()
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compiles, which a capture forbids
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)  # a replay must read what is there now
    graph.replay()
    expected = step()
    differ = [index for index, pair in enumerate(zip(captured, expected, strict=True)) if not torch.equal(*pair)]
    return [f"results {differ} of a replayed graph differ"] if differ else []
