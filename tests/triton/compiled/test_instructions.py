"""What a float32 adapter over a bfloat16 base costs on a GPU, by the compiler's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import collecting, hottest_loop, meta

from safe_kernels import triton
from safe_kernels.triton.lib import cka
from safe_kernels.triton.runtime import configs

ROWS, WIDTH, RANK = 8192, 4096, 16
TILES = {"_lora_sweep_kernel": "block_k", "_lora_apply_kernel": "block_n", "_lora_input_kernel": "block_n"}
MOST = {
    "lora_sweep": 0.16,
    "lora_sweep_dropped": 0.36,
    "lora_sweep_both": 0.22,
    "lora_apply": 0.31,
    "lora_input": 0.38,
    "lora_input_dropped": 0.75,
}
"""Warp instructions per element of the large matrix, in the loop. With tf32 they were 0.97, 1.29, 1.49 in two passes,
0.45, 0.86 and 1.32."""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The kernels of a training step with float32 adapters, by their tables' names."""
    x, state = meta(ROWS, WIDTH), meta(2, dtype=torch.int64)
    A, B = meta(RANK, WIDTH, dtype=torch.float32), meta(WIDTH, RANK, dtype=torch.float32)
    found: dict[str, Any] = {}
    for dropout_p in (0.0, 0.1):
        with collecting("sm_90") as kernels:
            triton.host_function("lora")(x, x, A, B, 2.0, dropout_p, state, None, 0, None)
            triton.host_function("lora_backward")(x, x, A, B, 2.0, dropout_p, state, [True, True, True])
        sweep, apply, *rest = [kernel for kernel in kernels if kernel.metadata.name in TILES]
        both, at_input = rest[-2:]
        suffix = "_dropped" if dropout_p else ""
        found |= {f"lora_sweep{suffix}": sweep, "lora_apply": apply, "lora_sweep_both": both}
        found[f"lora_input{suffix}"] = at_input
    return found


@pytest.mark.parametrize("name", MOST)
def test_instructions_per_element(name: str, compiled: dict[str, Any]) -> None:
    kernel = compiled[name]
    with collecting("sm_90"):
        chosen = configs.config(name, torch.bfloat16, RANK, terms=True)
    assert kernel.metadata.num_warps == chosen.warps
    elements = chosen.block_m * getattr(chosen, TILES[kernel.metadata.name])
    found = hottest_loop(kernel) * chosen.warps / elements
    print(f"{name} {found:.3f} warp instructions per element")
    assert found <= MOST[name]


@pytest.mark.parametrize("name", MOST)
def test_the_large_matrix_stays_as_it_is(name: str, compiled: dict[str, Any]) -> None:
    """Every product is one of bfloat16 factors."""
    dots = [line for line in compiled[name].asm["ttir"].splitlines() if "tt.dot " in line]
    assert dots and all("f32> *" not in line and line.count("xbf16>") == 2 for line in dots)


@pytest.mark.parametrize(("adapter", "most"), [(torch.bfloat16, 16), (torch.float32, 95)])
def test_instructions_per_column_of_a_scored_block(adapter: torch.dtype, most: float) -> None:
    """Warp instructions; 317 when centred rows were multiplied in tf32."""
    h, starts = meta(2, ROWS, RANK, dtype=torch.float32), meta(4, dtype=torch.int64)
    with collecting("sm_90") as kernels:
        cka.block_sums(meta(ROWS, WIDTH), h, meta(WIDTH, RANK, dtype=adapter), 2.0, starts, 128, None)
        chosen = configs.config("block_parts", torch.bfloat16, RANK, terms=adapter == torch.float32)
    found = hottest_loop(kernels[0]) * chosen.warps / chosen.block_n
    print(f"{found:.0f} warp instructions per column")
    assert kernels[0].metadata.name == "_block_parts_kernel" and found <= most
