"""A record launches what the host function launches, to the bit of every argument; only addresses are its own."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import small_tiles
import torch
from record_cases import (
    CASES,
    D_IN,
    F32,
    Arguments,
    N,
    halves,
    linear_backward,
    lora,
    normal,
    random_state,
    transposed,
    twice,
    unaligned,
)
from stub_driver import Stub, Watch, stub, traces
from torch import Tensor

import safe_kernels
from safe_kernels import _C, reference
from safe_kernels.triton.runtime import launch_replay
from safe_peft.planning.live_bytes import LiveBytes

CANNOT = "safe_kernels cannot record the launches of a call on a GPU"


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    small_tiles.use(monkeypatch)  # they compile in half of the time, and a record does not depend on their size
    _C.forget_records()
    yield stub()
    _C.forget_records()


def tensors(arguments: Arguments) -> list[Tensor]:
    return [value for value in arguments if isinstance(value, Tensor)]


def outputs(result: Any, watch: Watch) -> list[tuple[Any, ...]]:
    found = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in found]


def forbid(*args: Any) -> Any:
    raise AssertionError("Python was asked")


@pytest.mark.parametrize("name", CASES)
def test_a_record_does_what_its_host_function_does(name: str, driver: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    op, make = CASES[name]
    first, second = make(), make()
    driver.dispatched(op, *first)
    counts = {op: count for op, count in _C.record_counts().items() if count}
    assert counts == {op: 1}
    expected, by_host = driver.watched(lambda: driver.hosted(op, *second))
    monkeypatch.setattr(launch_replay.Recorder, "record", forbid)
    monkeypatch.setattr(launch_replay, "launch", forbid)
    found, by_record = driver.watched(lambda: driver.dispatched(op, *second))
    assert traces(by_record, tensors(second)) == traces(by_host, tensors(second))
    assert outputs(found, by_record) == outputs(expected, by_host)
    products = [launch for launch in by_record.launches if launch.function == 0]
    assert len(products) == (op.startswith("lora_linear") and "no rows" not in name)
    assert not any(made.tensor.requires_grad for made in by_record.made)
    # Where a launch's tensors are made: not before the host function makes them.
    assert len(by_record.made) <= len(by_host.made)
    results = found if isinstance(found, tuple) else (found,)
    assert all(
        any(made.tensor is t or made.tensor.data_ptr() == t.data_ptr() for made in by_record.made) for t in results
    )


def test_what_a_call_needs_in_between_goes_as_soon_as_it_is_done(driver: Stub) -> None:
    """No later than the host function lets it go: a tensor's memory is the next one's."""
    op, make = CASES["lora_backward"]
    driver.dispatched(op, *make())
    host, record = (peak_of(lambda call=call: call(op, *make())) for call in (driver.hosted, driver.dispatched))
    assert record <= host


def peak_of(call: Callable[[], Any]) -> int:
    with LiveBytes() as live:
        call()
    return live.peak


def kinds(driver: Stub, op: str, *calls: Arguments) -> int:
    for arguments in calls:
        driver.dispatched(op, *arguments)
    return _C.record_counts()[op]


def test_what_makes_another_kind_of_call(driver: Stub) -> None:
    x, state = normal(N, D_IN), random_state()
    assert kinds(driver, "dropout", [x, 0.1, state], [x.clone(), 0.1, state.clone()]) == 1
    assert kinds(driver, "dropout", [x, 0.2, state]) == 2
    assert kinds(driver, "dropout", [normal(N, D_IN + 16), 0.1, state]) == 3
    assert kinds(driver, "dropout", [x.float(), 0.1, state]) == 4
    assert kinds(driver, "dropout", transposed()) == 5
    assert kinds(driver, "dropout", unaligned()) == 6
    assert kinds(driver, "dropout", [x.view(2, N // 2, D_IN), 0.1, state]) == 7
    assert kinds(driver, "gated_activation", halves(), twice(), [*halves()[:2], "gelu", 0.0, None]) == 3


def test_one_tensor_twice_is_another_kind_of_call(driver: Stub) -> None:
    one, other = normal(N, D_IN), normal(N, D_IN)
    driver.dispatched("gated_activation", one, one, "silu", 0.0, None)
    call = "gated_activation", one, other, "silu", 0.0, None
    _, by_record = driver.watched(lambda: driver.dispatched(*call))
    driver.dispatched(*call)
    _, again = driver.watched(lambda: driver.dispatched(*call))
    assert {other.data_ptr()} <= set(by_record.launches[0].values) & set(again.launches[0].values)
    assert _C.record_counts()["gated_activation"] == 2


def test_tf32_makes_another_kind_of_call(driver: Stub) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    arguments = lora(F32, F32)
    driver.dispatched("lora", *arguments)
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        _, by_record = driver.watched(lambda: driver.dispatched("lora", *arguments))
        _, by_host = driver.watched(lambda: driver.hosted("lora", *arguments))
        assert traces(by_record, tensors(arguments)) == traces(by_host, tensors(arguments))
        assert _C.record_counts()["lora"] == 2
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_call_that_does_more_than_launch_is_left_to_its_host_function(driver: Stub) -> None:
    """The reference serves float64; its values are right the first time and the second."""
    for _ in range(2):
        arguments = [
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in lora()
        ]
        torch.testing.assert_close(driver.dispatched("lora", *arguments), reference.lora(*arguments), rtol=0, atol=0)
    assert _C.record_counts()["lora"] == 1  # that it has none is known


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("rms_norm_backward", [normal(N, 8), normal(N, 8), normal(8), torch.rand(N), 0.0, True, [True, True]]),
        ("lora_linear_backward", linear_backward(True, True, True, True, True)),
        ("dropout", [normal(N, D_IN), 0.1, torch.zeros(4, dtype=torch.int64)[::2]]),
    ],
)
def test_a_copy_or_a_sum_by_pytorch_has_no_record(op: str, arguments: Arguments, driver: Stub) -> None:
    for _ in range(2):
        _, watch = driver.watched(lambda: driver.dispatched(op, *arguments))
        assert watch.launches
    monkey = launch_replay.recorded(lambda *args: driver.hosted(op, *args))
    assert monkey(*arguments)[1:] == (None, True)


def test_errors_come_through(driver: Stub) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="base must have shape"):
            x, base, *rest = lora()
            driver.dispatched("lora", x, base[:, 1:], *rest)
    assert _C.record_counts()["lora"] == 0


def test_a_launch_that_fails_says_so(driver: Stub) -> None:
    arguments = CASES["dropout"][1]()
    driver.dispatched("dropout", *arguments)
    error = ctypes.c_int.in_dll(driver.library, "stub_error")
    error.value = 700
    try:
        with pytest.raises(RuntimeError, match=r"cannot launch a kernel: CUDA error 700 \(as the test wanted\)"):
            driver.dispatched("dropout", *arguments)
    finally:
        error.value = 0


def test_a_thread_without_a_context_asks_python(driver: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CASES["dropout"][1]()
    driver.dispatched("dropout", *arguments)
    context, asked = ctypes.c_void_p.in_dll(driver.library, "stub_context"), []
    launch = launch_replay.launch
    monkeypatch.setattr(safe_kernels.triton.runtime.host, "launch", lambda *a, **b: (asked.append(1), launch(*a, **b)))
    driver.dispatched("dropout", *arguments)
    assert asked == []
    context.value = None
    try:
        driver.dispatched("dropout", *arguments)
    finally:
        context.value = 1
    assert asked == [1]


def test_the_switch(driver: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch_replay.SWITCH, "0")
    arguments = CASES["dropout"][1]()
    assert launch_replay.recorded(lambda *args: driver.hosted("dropout", *args))(*arguments)[1:] == (None, True)


def test_tuning_forgets_records(driver: Stub, tmp_path: Any) -> None:
    driver.dispatched("dropout", *CASES["dropout"][1]())
    assert _C.record_counts()["dropout"] == 1
    with safe_kernels.autotune(cache=tmp_path):
        assert _C.record_counts()["dropout"] == 0
        driver.dispatched("dropout", *CASES["dropout"][1]())
        assert _C.record_counts()["dropout"] == 1
    assert _C.record_counts()["dropout"] == 0


def test_a_watched_launch_has_no_record(driver: Stub) -> None:
    from triton import knobs

    def hook(metadata: Any) -> None:
        seen.append(metadata)

    seen: list[Any] = []
    arguments = CASES["dropout"][1]()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            driver.dispatched("dropout", *arguments)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 2 and _C.record_counts()["dropout"] == 0
    driver.dispatched("dropout", *arguments)
    assert _C.record_counts()["dropout"] == 1, "once nobody watches"


@pytest.mark.parametrize("lost", ["ptx", "metadata", "function"])
def test_launches_that_cannot_be_recorded_fail_no_call_and_are_told_once(
    lost: str, driver: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels may be stored without their PTX, and a newer Triton may tell other things of them."""

    def note(self: Any, kernel: Any, compiled: Any, *args: Any) -> None:
        facts = {name: getattr(compiled, name) for name in ("asm", "metadata", "src", "function")}
        facts |= {"asm": {}} if lost == "ptx" else {}
        facts.pop(lost, None)
        launched(self, kernel, SimpleNamespace(**facts), *args)

    launched = launch_replay.Recorder.launched
    monkeypatch.setattr(launch_replay.Recorder, "launched", note)
    monkeypatch.setattr(launch_replay, "OBSTACLES", found := Counter())
    arguments = CASES["dropout"][1]()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            _, watch = driver.watched(lambda: driver.dispatched("dropout", *arguments))
            assert len(watch.launches) == 1
        assert launch_replay.recorded(lambda *args: driver.hosted("dropout", *args))(*arguments)[1:] == (None, True)
    assert [str(warning.message).split(":")[0] for warning in told] == [CANNOT]
    assert list(found.values()) == [2] and (lost == "ptx") == ("TRITON_STORE_BINARY_ONLY" in next(iter(found)))


def test_a_call_that_no_record_can_represent_is_no_obstacle(driver: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_replay, "OBSTACLES", found := Counter())
    driver.dispatched("dropout", normal(N, D_IN), 0.1, torch.zeros(4, dtype=torch.int64)[::2])
    assert not found


def test_the_kinds_not_made_for_the_longest_time_go_first(driver: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    monkeypatch.setattr(launch_replay.Recorder, "record", lambda self, result: recorded.append(result.numel()))
    monkeypatch.setattr(safe_kernels.triton, "host_function", lambda op: lambda x, *rest: x)

    def call(*sizes: int) -> None:
        for size in sizes:
            driver.dispatched("dropout", torch.empty(size), 0.1, None)

    call(*range(1, 4097), 1, *range(4097, 4101))
    assert _C.record_counts()["dropout"] == 4096
    recorded.clear()
    call(1, 4100, 6, 5)
    assert recorded == [5]


def test_a_number_too_large_for_a_kernel_is_infinite(driver: Stub) -> None:
    arguments = lora()
    (place,) = [index for index, value in enumerate(arguments) if isinstance(value, float) and value > 0.5]
    arguments[place] = 1e39
    for _ in range(2):
        _, by_record = driver.watched(lambda: driver.dispatched("lora", *arguments))
        _, by_host = driver.watched(lambda: driver.hosted("lora", *arguments))
        assert traces(by_record, tensors(arguments)) == traces(by_host, tensors(arguments))


def test_what_plans_launch_is_not_unloaded(driver: Stub) -> None:
    arguments = CASES["dropout"][1]()
    driver.dispatched("dropout", *arguments)
    _, watch = driver.watched(lambda: driver.dispatched("dropout", *arguments))
    assert watch.launches and all(launch.function in launch_replay._LOADED for launch in watch.launches)


def test_the_first_call_needs_no_more_memory_than_the_host_function(driver: Stub) -> None:
    """Batches of many lengths are many first calls."""
    op, make = CASES["lora_backward"]
    host, first = (peak_of(lambda call=call: call(op, *make())) for call in (driver.hosted, driver.dispatched))
    assert _C.record_counts()[op] == 1 and first <= host


def test_tensors_on_several_devices_have_no_record() -> None:
    recorder = launch_replay.Recorder([torch.zeros(1), torch.zeros(1, device="meta")])
    made = torch.zeros(1)
    recorder.allocated(made)
    assert recorder.record(made) is None
    recorder.inputs.pop()
    assert recorder.record(made) is not None


def test_what_is_gone_owns_nothing(driver: Stub) -> None:
    """A tensor of somebody else's at the address of one that was allocated and let go."""
    recorder = launch_replay.Recorder([])
    address = (made := torch.zeros(1024)).data_ptr()
    recorder.allocated(made)
    assert recorder._address(made) == (0, 0) and recorder._address(made[3:]) == (0, 12)
    made.untyped_storage().resize_(0)
    del made
    others = [torch.zeros(1024) for _ in range(8)]
    for other in others:
        assert not recorder.allocations[0].holds(other), "even one at the same address" * (other.data_ptr() == address)
        with pytest.raises(launch_replay.Unrecordable):
            recorder._address(other)


def test_what_is_forgotten_while_it_is_noted_leaves_no_record(driver: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    record = launch_replay.Recorder.record
    monkeypatch.setattr(
        launch_replay.Recorder, "record", lambda self, result: (launch_replay.forget(), record(self, result))[1]
    )
    driver.dispatched("dropout", *CASES["dropout"][1]())
    assert _C.record_counts()["dropout"] == 0


def test_many_threads_make_and_take_records(driver: Stub) -> None:
    errors: list[Exception] = []

    def work(seed: int) -> None:
        try:
            for step in range(40):
                width = 16 * (1 + (seed + step) % 5)
                out = driver.dispatched("dropout", torch.zeros(4, width), 0.1, torch.zeros(2, dtype=torch.int64))
                assert out.shape == (4, width)
                if step % 10 == 0:
                    _C.forget_records()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
