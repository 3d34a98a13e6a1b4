"""Whatever tuning may take compiles, fits, and neither spills nor waits: it is not the clock's business to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from compiling import SHARED_KIB, cells, collecting, compile_call, meta, problems
from torch import Tensor

from safe_kernels.triton import lora, lora_linear
from safe_kernels.triton.lib import lora_gradients, skinny_matmul
from safe_kernels.triton.runtime import configs, host

HALF, SINGLE = torch.bfloat16, torch.float32
ROWS, WIDTH = 8192, 4096
Launch = Callable[[configs.Config], Any]


def launches(kernel: str, operand: torch.dtype, rank: int, terms: bool) -> Iterator[Launch]:
    """A kernel in the forms that hold most at a time, over a base of half precision."""
    arithmetic = host.Product(HALF, "terms") if terms else host.product(HALF, operand)
    x, h = meta(ROWS, WIDTH), meta(1, ROWS, rank, dtype=SINGLE)
    grad_h = meta(ROWS, rank, dtype=operand)
    A, B = meta(rank, WIDTH, dtype=operand), meta(WIDTH, rank, dtype=operand)
    keep, drop = host.Dropout(None, 0, 1.0), host.Dropout(meta(2, dtype=torch.int64), 1, 1.1)
    if kernel == "lora_sweep":
        yield partial(skinny_matmul._sweep, x, A, arithmetic, keep, 1.0, None)
    elif kernel == "lora_sweep_dropped":
        yield partial(skinny_matmul._sweep, x, A, arithmetic, drop, 1.0, None)
    elif kernel == "lora_sweep_both":
        yield partial(skinny_matmul._sweep, x, A, arithmetic, keep, 1.0, h)
    elif kernel == "lora_apply":
        yield partial(lora._apply, x, None, x, B, h, 2.0, arithmetic)
        yield partial(lora._apply, None, meta(WIDTH), x, B, h, 2.0, arithmetic)
    elif kernel == "lora_input_dropped":
        yield partial(lora_gradients._input_gradients, x, x, A, grad_h, drop, True, True, arithmetic)
        yield partial(lora_gradients._input_gradients, x, x, A, grad_h, drop, False, True, arithmetic)
    elif kernel == "lora_input":
        yield partial(lora_gradients._input_gradients, x, x, A, grad_h, keep, True, True, arithmetic)
        yield partial(lora_gradients._input_gradients, x, x, A, grad_h, keep, False, True, arithmetic)
    else:
        weight: Tensor = meta(WIDTH, WIDTH)
        yield partial(lora_linear._multiply, x, weight.t(), meta(WIDTH), h, B.t(), keep, 2.0)
        yield partial(lora_linear._multiply, x, weight, None, h, A, drop, 1.0)


def others(kernel: str, operand: torch.dtype, rank: int, target: str, terms: bool) -> list[configs.Config]:
    """Candidates other than the table's choice, which has its tests."""
    with collecting(target):
        if terms and not configs.has_terms(kernel, rank):
            return []
        return configs.candidates(kernel, HALF if terms else operand, rank, terms)[1:]


def ranks(kernel: str, operand: torch.dtype, target: str) -> tuple[int, ...]:
    """The widest tile of the rank, and where wgmma may be made to wait a narrow one too."""
    if kernel == "lora_sweep_both":
        return (16,)
    return (32, 64) if operand == SINGLE else (16, 64) if target == "sm_90" else (64,)


def forms(kernel: str, operand: torch.dtype, rank: int, target: str, terms: bool) -> list[Launch]:
    """All forms where most people train, and elsewhere the one that holds most."""
    return list(launches(kernel, operand, rank, terms))[: None if target in ("sm_80", "sm_90") else 1]


NEWEST_UNITS = {"sm_90": "WGMMA", "sm_100": "TCGEN05"}
RUNS = [
    (kernel, operand, target, False)
    for kernel in configs.NEIGHBOURS
    for operand, targets in ((HALF, ("sm_80", "sm_90", "sm_100", "gfx942")), (SINGLE, ("sm_80", "gfx942")))
    for target in targets
    if operand == HALF or kernel != "lora_sweep_both"
] + [
    (kernel, SINGLE, target, True)
    for kernel, entries in configs.NEIGHBOURS.items()
    for target in ("sm_90", "sm_100")
    if any(entry.terms for entry in entries)
]
"""sm_86 and sm_89 run what sm_80 does, if it fits there."""


@pytest.mark.parametrize(("kernel", "operand", "target", "terms"), RUNS)
def test_candidates_fit(
    kernel: str, operand: torch.dtype, target: str, terms: bool, record_property: Callable[[str, object], None]
) -> None:
    rows, wrong = [], []
    for rank in (16, *ranks(kernel, operand, target)) if terms else ranks(kernel, operand, target):
        for entry in others(kernel, operand, rank, target, terms):
            for run in forms(kernel, operand, rank, target, terms):
                for found in compile_call(target, partial(run, entry)):
                    rows.append(cells(f"{entry} r{rank}", found))
                    wrong += problems(found, exact=operand == SINGLE and kernel == "lora_linear")
                    assert target != "sm_90" or kernel == "lora_linear" or found.programs >= entry.at_once, found
                    if kernel == "lora_linear" and operand == HALF and entry.block_m > 32:
                        assert NEWEST_UNITS.get(target, "") in found.tensor_core, found
                    if target == "sm_80" and entry.shared <= SHARED_KIB["sm_89"]:
                        assert found.shared <= SHARED_KIB["sm_89"] * 1024, "it would be offered there"
    assert rows or (kernel, target) == ("lora_sweep", "gfx942"), "there is a choice"
    record_property("compiled", rows)
    assert wrong == []


TABLES = [
    (kernel, operand, rank, terms)
    for kernel in configs.SWEEPS
    for operand, rank, terms in ((HALF, 16, False), (HALF, 64, False), (SINGLE, 16, True), (SINGLE, 32, True))
    if kernel != "lora_sweep_both" or rank == 16
]


@pytest.mark.parametrize(("kernel", "operand", "rank", "terms"), TABLES)
def test_as_many_programs_fit_as_the_table_says(kernel: str, operand: torch.dtype, rank: int, terms: bool) -> None:
    """Grids follow from it. The table may have one fewer, because a GPU with the same tiles holds fewer."""
    with collecting("sm_90"):
        chosen = configs.config(kernel, HALF if terms else operand, rank, terms)
    found = [
        fit for run in launches(kernel, operand, rank, terms) for fit in compile_call("sm_90", partial(run, chosen))
    ]
    assert [problem for fit in found for problem in problems(fit, exact=False)] == []
    assert chosen.at_once <= min(fit.programs for fit in found) <= chosen.at_once + 1


@pytest.mark.parametrize("target", SHARED_KIB)
def test_a_candidate_has_one_name(target: str) -> None:
    for kernel, operand in product(configs.NEIGHBOURS, (HALF, SINGLE)):
        if (kernel, operand) == ("lora_sweep_both", SINGLE):
            continue  # it is for half precision
        with collecting(target):
            labels = [str(entry) for entry in configs.candidates(kernel, operand, 16)]
        assert len(set(labels)) == len(labels)
