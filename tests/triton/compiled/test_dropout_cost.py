"""What dropout costs on a GPU, by the compiler's code: one mask for each pass, and few instructions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from compiling import collecting, hottest_loop, meta

from safe_kernels import triton

ROWS, WIDTH, RANK = 8192, 4096, 16
MOST = {"_lora_sweep_kernel": 0.36, "_lora_input_kernel": 0.6}
"""Warp instructions per element of x, in the loop."""
PRODUCTS = 9
"""Of 14 products of words in 7 rounds. The other five take only the row or only the column, not both."""


def kernels() -> list[Any]:
    """The kernels with dropout, of a trained adapter's forward and backward in bf16."""
    x, A, B, state = meta(ROWS, WIDTH), meta(RANK, WIDTH), meta(WIDTH, RANK), meta(2, dtype=torch.int64)
    with collecting("sm_90") as compiled:
        triton.host_function("lora")(x, x, A, B, 2.0, 0.1, state, None, 0, None)
        triton.host_function("lora_backward")(x, x, A, B, 2.0, 0.1, state, [True, True, True])
    return [kernel for kernel in compiled if products(kernel)]


def products(kernel: Any) -> list[tuple[int, int]]:
    """The shapes of the wide products on whole tiles: a counter for eight columns of a row."""
    found = re.findall(r"arith\.muli .*: tensor<(\d+)x(\d+)xi64", kernel.asm["ttgir"])
    return [(int(rows), int(groups)) for rows, groups in found if min(int(rows), int(groups)) > 1]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    found = {kernel.metadata.name: kernel for kernel in kernels()}
    assert set(found) == set(MOST)
    return found


@pytest.mark.parametrize("name", MOST)
def test_one_mask_for_each_pass(name: str, compiled: dict[str, Any]) -> None:
    """Also where two products take it in different layouts, for which the compiler may well compute it twice."""
    kernel = compiled[name]
    assert len(products(kernel)) == PRODUCTS and len(set(products(kernel))) == 1
    assert "mulhiui" not in kernel.asm["ttgir"], "both halves come from one product"


@pytest.mark.parametrize("name", MOST)
def test_seed_and_offset_are_read_before_the_loop(name: str, compiled: dict[str, Any]) -> None:
    before, *loops = compiled[name].asm["ttgir"].split("scf.for")
    assert before.count(": !tt.ptr<i64>") >= 2 and loops
    assert all(": !tt.ptr<i64>" not in loop for loop in loops)


@pytest.mark.parametrize("name", MOST)
def test_instructions_per_element(name: str, compiled: dict[str, Any]) -> None:
    kernel = compiled[name]
    rows, groups = products(kernel)[0]
    assert hottest_loop(kernel) * kernel.metadata.num_warps / (rows * groups * 8) <= MOST[name]
