"""Drives records over a driver whose one kernel copies: without Triton, which the sanitizers would only slow down."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from driving import ROWS, WIDTHS, count, exactly, run, views, with_one_and_two_threads
from stub_library import WATCHER, load
from torch import Tensor

from safe_kernels import _C

NEVER = 2**63 - 1
ADDRESS, FLOATS = -1, 4
COPY = 1


@WATCHER
def kernel(function: int, grid: Any, threads: int, shared: int, stream: int, parameters: Any) -> None:
    """Copies: source, target, number of floats."""
    source, target = (ctypes.c_uint64.from_address(parameters[i]).value for i in range(2))
    floats = ctypes.c_int32.from_address(parameters[2]).value
    assert (function, list(grid[:3]), threads) == (COPY, [floats, 1, 1], 32)
    ctypes.memmove(target, source, FLOATS * floats)


def copy(source: int, target: int, floats: int) -> tuple[int, tuple[int, int, int], int, int, list[tuple[int, int]]]:
    return COPY, (floats, 1, 1), 32, 0, [(source, 0), (target, 0), (ADDRESS, floats)]


def host(x: Tensor, dropout_p: float, rng_state: Tensor) -> Tensor:
    if dropout_p > 0.75:
        raise ValueError("refused")
    return x.contiguous().clone()


def recorded(x: Tensor, dropout_p: float, rng_state: Tensor) -> tuple[Tensor, Any, bool]:
    """Copies twice, by way of a tensor that goes in between; to what is square a product of no columns is added."""
    out, n = host(x, dropout_p, rng_state), x.numel()
    if not x.is_contiguous() or x.dtype != torch.float32:
        return out, None, True
    steps: list[Any] = [copy(0, 2, n), copy(2, 3, n)] if n else []
    shape = list(x.shape)
    if x.dim() == 2 and x.shape[0] == x.shape[1] and n:
        view = (3, shape, [x.shape[1], 1], 0)
        nothing = (0, [x.shape[0], 0], [x.shape[1], 1], 0), (0, [0, x.shape[1]], [x.shape[1], 1], 0)
        steps.append((view, *nothing))
    allocations = [(shape, torch.float32, 0, 1 if n else NEVER), (shape, torch.float32, min(1, len(steps)), NEVER)]
    return out, _C.LaunchRecord(allocations, steps, [1]), True


def call(x: Tensor, dropout_p: float = 0.5) -> Tensor:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    return torch.ops.safe_kernels.dropout.default.redispatch(keys, x, dropout_p, torch.zeros(2, dtype=torch.int64))


def once(x: Tensor, *, times: int = 3) -> None:
    for _ in range(times):
        assert torch.equal(call(x), x)
        assert torch.equal(call(exactly(x + 1)), x + 1)


def many_shapes() -> None:
    for i in range(count(440)):
        once(exactly(torch.randn(ROWS[i % len(ROWS)], WIDTHS[i % len(WIDTHS)])))
    once(exactly(torch.randn(17, 17)))


def other_strides_and_dtypes() -> None:
    for x in (*views(torch.randn(7, 9)), torch.randn(7, 9).double(), torch.randn(7, 9).bfloat16()):
        once(x)


def errors() -> None:
    for _ in range(100):
        try:
            call(torch.ones(3), 0.9)
        except ValueError as error:
            assert str(error) == "refused"
        else:
            raise AssertionError("took what its host function refuses")


def records_that_point_nowhere() -> None:
    wrong = [
        _C.LaunchRecord([([2], torch.float32, 0, NEVER)], [copy(7, 2, 2)], [0]),
        _C.LaunchRecord([([2], torch.float32, 0, NEVER)], [((9, [1, 1], [1, 1], 0),) * 3], [0]),
        _C.LaunchRecord([([2], torch.float32, 0, NEVER)], [], [5]),
    ]
    for number, record in enumerate(wrong):
        _C.register_replayed("activation", lambda x, *_: x.clone(), lambda x, *_, p=record: (x.clone(), p, True), "XPU")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
        arguments = torch.ones(2 + number), "relu", 0.0, None
        torch.ops.safe_kernels.activation.default.redispatch(keys, *arguments)
        try:
            torch.ops.safe_kernels.activation.default.redispatch(keys, *arguments)
        except (IndexError, RuntimeError):
            continue
        raise AssertionError("carried out")


def a_driver_that_fails() -> None:
    x, error = torch.ones(5), ctypes.c_int.in_dll(DRIVER, "stub_error")
    once(x)
    error.value = 700
    try:
        call(x)
    except RuntimeError as raised:
        assert "CUDA error 700" in str(raised)
    else:
        raise AssertionError("did not say so")
    finally:
        error.value = 0


def more_kinds_of_calls_than_are_kept() -> None:
    for n in range(5000):
        assert call(torch.zeros(n + 1)).shape == (n + 1,)
    assert _C.record_counts()["dropout"] == 4096


def threads() -> None:
    def work(turn: int) -> None:
        for n in (turn % 5 + 1, 8, 64):
            once(torch.randn(n, n), times=1)
        if turn % 7 == 0:
            _C.forget_records()

    with_one_and_two_threads(work)


if __name__ == "__main__":
    DRIVER, _ = load()
    DRIVER.watch(kernel)
    _C.register_replayed("dropout", host, recorded, "XPU")
    run(
        many_shapes,
        other_strides_and_dtypes,
        errors,
        records_that_point_nowhere,
        a_driver_that_fails,
        more_kinds_of_calls_than_are_kept,
        threads,
    )
