"""Every kernel compiles for every kind of GPU, fits into it, and uses its matrix units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from compiling import cells, compile_call, meta, problems

from safe_kernels import triton

HALF, SINGLE = torch.bfloat16, torch.float32
"""The matrix units that give these GPUs their rate, which a GEMM has to use; older ones' instructions run there too."""
ROWS, WIDTH = 8192, 4096


def call(op: str, *arguments: object) -> None:
    triton.host_function(op)(*arguments)


def lora(
    dtype: torch.dtype, adapter: torch.dtype, rank: int, dropout_p: float, scored: bool = False, *, whole: bool
) -> None:
    """A training step of an adapter, scored or not; `whole`: also in a first layer, and of a frozen adapter."""
    x, base = meta(ROWS, WIDTH, dtype=dtype), meta(ROWS, WIDTH, dtype=dtype)
    A, B = meta(rank, WIDTH, dtype=adapter), meta(WIDTH, rank, dtype=adapter)
    state = meta(2, dtype=torch.int64)
    scored = scored and (whole or rank == 16)
    blocks = (meta(4, dtype=torch.int64), 128, meta(ROWS, dtype=torch.bool)) if scored else (None, 0, None)
    call("lora", x, base, A, B, 2.0, dropout_p, state, *blocks)
    call("lora_backward", base, x, A, B, 2.0, dropout_p, state, [True, True, True])
    if whole:
        call("lora_backward", base, x, A, B, 2.0, dropout_p, state, [False, True, True])
        call("lora_backward", base, None, A, B, 2.0, dropout_p, state, [True, False, False])


def lora_linear(dtype: torch.dtype, adapter: torch.dtype, rank: int, dropout_p: float, *, whole: bool) -> None:
    x, weight = meta(ROWS, WIDTH, dtype=dtype), meta(WIDTH, WIDTH, dtype=dtype)
    A, B = meta(rank, WIDTH, dtype=adapter), meta(WIDTH, rank, dtype=adapter)
    state = meta(2, dtype=torch.int64)
    call("lora_linear", x, weight, None, A, B, 2.0, dropout_p, state, None, 0, None)
    call("lora_linear", x, weight, meta(WIDTH, dtype=dtype), A, B, 2.0, dropout_p, state, None, 0, None)
    call("lora_linear_backward", x, None, weight, A, B, 2.0, dropout_p, state, [True, False, False, False, False])


def norms(dtype: torch.dtype, width: int, *, whole: bool) -> None:
    """Frozen from the output, and training from the input."""
    x, weight, rstd = meta(ROWS, width, dtype=dtype), meta(width, dtype=dtype), meta(ROWS, dtype=SINGLE)
    call("rms_norm", x, weight, 1e-5)
    call("layer_norm", x, weight, weight, 1e-5)
    for from_output, trains in ((True, False), (False, True)):
        call("rms_norm_backward", x, x, weight, rstd, 0.0, from_output, [True, trains])
        call("layer_norm_backward", x, x, weight, weight, rstd, rstd, from_output, [True, trains, trains])


def elementwise(dtype: torch.dtype, dropout_p: float, *, whole: bool) -> None:
    x, state = meta(ROWS, WIDTH, dtype=dtype), meta(2, dtype=torch.int64)
    call("dropout", x, 0.1, state)
    angles = meta(1, ROWS, 128, dtype=dtype)
    for is_transposed in (False, True) if whole else (False,):
        call("rotary", meta(1, ROWS, 32, 128, dtype=dtype), angles, angles, is_transposed)
    for kind in ("silu", "gelu", "gelu_tanh", "relu") if whole else ("gelu",):
        call("activation", x, kind, dropout_p, state)
        call("activation_backward", x, x, kind, dropout_p, state)
        call("gated_activation", x, x, kind, dropout_p, state)
        call("gated_activation_backward", x, x, x, kind, dropout_p, state, [True, True])


CASES: dict[str, Callable[..., None]] = {
    "lora bf16 r16 p0.1": partial(lora, HALF, HALF, 16, 0.1, True),
    "lora bf16 r64 p0.1": partial(lora, HALF, HALF, 64, 0.1, True),
    "lora bf16 r64": partial(lora, HALF, HALF, 64, 0.0),
    "lora bf16 r8 p0.1": partial(lora, HALF, HALF, 8, 0.1),
    "lora bf16 r128 p0.1": partial(lora, HALF, HALF, 128, 0.1),
    "lora bf16 r256": partial(lora, HALF, HALF, 256, 0.0),
    "lora fp32 over bf16 r64 p0.1": partial(lora, HALF, SINGLE, 64, 0.1),
    "lora fp32 over bf16 r16": partial(lora, HALF, SINGLE, 16, 0.0, True),
    "lora fp32 over bf16 r16 p0.1": partial(lora, HALF, SINGLE, 16, 0.1),
    "lora fp32 over bf16 r32 p0.1": partial(lora, HALF, SINGLE, 32, 0.1),
    "lora fp32 r64 p0.1": partial(lora, SINGLE, SINGLE, 64, 0.1),
    "lora_linear bf16 r16 p0.1": partial(lora_linear, HALF, HALF, 16, 0.1),
    "lora_linear fp16 r8": partial(lora_linear, torch.float16, torch.float16, 8, 0.0),
    "lora_linear bf16 r64": partial(lora_linear, HALF, HALF, 64, 0.0),
    "lora_linear fp32 over bf16 r16 p0.1": partial(lora_linear, HALF, SINGLE, 16, 0.1),
    "lora_linear fp32 r16": partial(lora_linear, SINGLE, SINGLE, 16, 0.0),
    "norms bf16 d4096": partial(norms, HALF, 4096),
    "norms fp32 d8192": partial(norms, SINGLE, 8192),
    "norms bf16 d384": partial(norms, HALF, 384),
    "elementwise bf16 p0.1": partial(elementwise, HALF, 0.1),
}
TARGETS = {
    "lora bf16 r16 p0.1": ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942"),
    "lora bf16 r64 p0.1": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "lora bf16 r64": ("sm_89", "sm_90"),
    "lora bf16 r8 p0.1": ("sm_90",),
    "lora bf16 r128 p0.1": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "lora bf16 r256": ("sm_80", "sm_90", "gfx942"),
    "lora fp32 over bf16 r64 p0.1": ("sm_80", "sm_90", "gfx942"),
    "lora fp32 over bf16 r16": ("sm_90", "gfx942"),
    "lora fp32 over bf16 r16 p0.1": ("sm_80", "sm_86", "sm_90", "sm_100"),
    "lora fp32 over bf16 r32 p0.1": ("sm_80", "sm_90", "sm_100"),
    "lora fp32 r64 p0.1": ("sm_80",),
    "lora_linear bf16 r16 p0.1": ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942"),
    "lora_linear bf16 r64": ("sm_90",),
    "lora_linear fp16 r8": ("sm_90",),
    "lora_linear fp32 over bf16 r16 p0.1": ("sm_90",),
    "lora_linear fp32 r16": ("sm_90", "gfx942"),
    "norms fp32 d8192": ("sm_80", "gfx942"),
    "norms bf16 d384": ("sm_89", "sm_90"),
    "norms bf16 d4096": ("sm_80", "sm_90", "sm_100", "gfx942"),
    "elementwise bf16 p0.1": ("sm_86", "sm_90", "gfx942"),
}
"""Cases are compiled for some targets only, for the sake of time: what differs there is in another case. sm_86 and
sm_89 take the same tiles, so a case is compiled for one of them at most. Wide ranks have sm_80's tiles there."""
WHOLE = ("sm_80", "sm_90")
"""Here a case has all of its forms. Elsewhere it has those that hold most at a time."""
RUNS = [(case, target) for case, targets in TARGETS.items() for target in targets]


@pytest.mark.parametrize(("case", "target"), RUNS)
def test_kernels_fit(case: str, target: str, record_property: Callable[[str, object], None]) -> None:
    compiled = compile_call(target, partial(CASES[case], whole=target in WHOLE))
    assert compiled
    record_property("compiled", [cells(case, found) for found in compiled])
    assert [problem for found in compiled for problem in problems(found, exact="fp32 r" in case)] == []


def test_tf32_uses_matrix_units() -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        compiled = compile_call("sm_90", partial(CASES["lora_linear fp32 r16"], whole=True))
    finally:
        matmul.fp32_precision = before
    assert [problem for found in compiled for problem in problems(found, exact=False)] == []


@pytest.mark.parametrize("size", [1, 33])
def test_sizes_that_the_compiler_specialises_otherwise(size: int) -> None:
    """A size of 1 becomes a constant, and one that 16 does not divide loses its wide loads: it may spill, and fits."""
    x, square, row = meta(size, size), meta(size, size), meta(size)
    starts, state = meta(1, dtype=torch.int64), meta(2, dtype=torch.int64)
    statistic = meta(size, dtype=SINGLE)

    def everything() -> None:
        blocks = (starts, 128, meta(size, dtype=torch.bool))
        call("lora", x, x, square, square, 2.0, 0.1, state, *blocks)
        call("lora_backward", x, x, square, square, 2.0, 0.1, state, [True, True, True])
        call("lora_linear", x, square, row, square, square, 2.0, 0.1, state, *blocks)
        call("lora_linear_backward", x, x, square, square, square, 2.0, 0.1, state, [True] * 5)
        call("layer_norm", x, row, row, 1e-5)
        call("layer_norm_backward", x, x, row, row, statistic, statistic, False, [True, True, True])
        call("gated_activation", x, x, "silu", 0.1, state)
        call("gated_activation_backward", x, x, x, "silu", 0.1, state, [True, True])

    compiled = compile_call("sm_90", everything)
    assert len({found.kernel for found in compiled}) >= 11
    found_wrong = [problem for found in compiled for problem in problems(found, exact=True)]
    assert [problem for problem in found_wrong if ": spills" not in problem] == []
