"""Tuning by a clock that is made up: what is timed, what is taken, and that nobody notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from linears import Linear, linear
from oracle import DTYPES, Shape, problem
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode

import safe_kernels
import safe_peft
from safe_kernels import AdapterStatistics, RowBlocks
from safe_kernels.retention import measure
from safe_kernels.triton import lora, lora_linear
from safe_kernels.triton.lib import lora_gradients, skinny_matmul
from safe_kernels.triton.runtime import configs, tuning
from safe_kernels.triton.runtime.configs import Config

HALF = DTYPES[2]
MIDDLE = Shape(20, 18, 17, 5)
SIZES = ((16, 16), (16, 32), (32, 16))
TABLES, FAST = "16x16", "32x16"


def tiles(chosen: Config) -> str:
    return f"{chosen.block_m}x{chosen.block_n or chosen.block_k}"


class Clock:
    """Runs what it times, and says what a test wants it to."""

    def __init__(self) -> None:
        self.timed: list[str] = []
        self.fastest = FAST
        self.broken = False

    def __call__(self, run: Any) -> float | None:
        run()
        chosen = run.args[-1]
        label = tiles(chosen) if isinstance(chosen, Config) else run.args[0].__name__
        self.timed.append(label)
        return None if self.broken else 1.0 if label == self.fastest else 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def entries(kernel: str) -> tuple[Config, ...]:
        if kernel.startswith("lora_sweep"):
            return tuple(Config(m, block_k=k, half=True) for m, k in SIZES)
        return tuple(Config(m, n, block_k=16 if kernel == "lora_linear" else 0, half=True) for m, n in SIZES)

    table = {name: entries(name) for name in configs.NEIGHBOURS}
    first = {name: (found[0], configs.TABLE[name][-1]) for name, found in table.items()}
    monkeypatch.setattr(configs, "TABLE", configs.TABLE | first)
    monkeypatch.setattr(configs, "NEIGHBOURS", {name: found[1:] for name, found in table.items()})
    monkeypatch.setattr(tuning, "milliseconds", clock)
    return clock


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path) -> Iterator[None]:
    with safe_kernels.autotune(cache=tmp_path):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiles of every launch that can be tuned, timed or not."""
    found: list[str] = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any) -> Any:
            found.append(tiles(args[-1]))
            return function(*args)

        return recorded

    places = (
        (skinny_matmul, "_sweep"),
        (lora, "_apply"),
        (lora_gradients, "_input_gradients"),
        (lora_linear, "_multiply"),
    )
    for module, name in places:
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return found


def step(p: Linear) -> list[torch.Tensor]:
    p.require("x", "A", "B")
    out = p.call()
    out.backward(p.grad)
    grads = [tensor.grad for tensor in (p.x, p.A, p.B)]
    for tensor in (p.x, p.A, p.B):
        tensor.grad = None
    return [out.detach(), *grads]


def forget() -> None:
    """As a new process would: only the file is left."""
    tuning._tuner.cache_clear()


def test_off_nothing_is_timed(clock: Clock, taken: list[str]) -> None:
    with safe_kernels.autotune(False):
        step(linear(MIDDLE, HALF, dropout_p=0.1))
    assert clock.timed == []
    assert set(taken) == {TABLES}


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_fastest_is_taken_from_the_first_call_on(clock: Clock, taken: list[str], dropout_p: float) -> None:
    p = linear(MIDDLE, HALF, dropout_p=dropout_p)
    first = step(p)
    assert len(clock.timed) % 3 == 0 and len(clock.timed) >= 12
    taken.clear()
    again = step(p)
    assert set(taken) == {FAST}
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a call repeats to the bit"


def test_it_computes_what_the_table_computes(clock: Clock) -> None:
    p = linear(MIDDLE, HALF, dropout_p=0.2)
    clock.fastest = TABLES  # then every bit is the same
    tuned = step(p)
    with safe_kernels.autotune(False):
        plain = step(p)
    assert all(torch.equal(a, b) for a, b in zip(tuned, plain, strict=True))


def test_nobody_notices(clock: Clock) -> None:
    p = linear(MIDDLE, HALF)
    inputs = {name: tensor.clone() for name, tensor in p.inputs.items()}
    statistics = AdapterStatistics(blocks=RowBlocks(torch.tensor([0, 8]), 8))
    random = torch.get_rng_state()
    retained = measure(lambda: p.require("x", "A", "B").call(statistics=statistics), exclude=p.inputs.values())
    assert clock.timed
    assert statistics.rows == 16
    assert retained.bytes == 0, "x is excluded, and nothing else is kept"
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, inputs[name]) for name, tensor in p.inputs.items())
    assert all(tensor._version == 0 and tensor.grad is None for tensor in p.inputs.values())


def test_what_counts_as_another_call(clock: Clock) -> None:
    def timed(shape: Shape, dtypes: Any = HALF, **options: Any) -> int:
        before = len(clock.timed)
        p = linear(shape, dtypes, **options)
        p.call()
        return len(clock.timed) - before

    assert timed(MIDDLE) == 6, "two kernels, three candidates"
    assert timed(MIDDLE) == 0
    assert timed(Shape(30, 25, 32, 6)) == 0, "the same powers of two"
    assert timed(Shape(33, 18, 17, 5)) == 6
    assert timed(Shape(20, 18, 17, 9)) == 6
    assert timed(MIDDLE, DTYPES[3]) == 6, "another dtype"
    assert timed(MIDDLE, dropout_p=0.1) == 3, "the product of h with B drops nothing"
    assert timed(MIDDLE, has_bias=False) == 3
    by_columns = linear(MIDDLE, HALF, has_bias=False)
    by_columns.weight = by_columns.weight.t().contiguous().t()
    clock.timed.clear()
    by_columns.call()
    assert len(clock.timed) == 3, "the weight lies otherwise"
    assert timed(MIDDLE, DTYPES[0]) == 0, "one candidate is no choice"


def test_the_next_process_finds_the_choice(clock: Clock, taken: list[str], tmp_path: Path) -> None:
    p = linear(MIDDLE, HALF)
    p.call()
    clock.timed.clear()
    taken.clear()
    forget()
    with safe_kernels.autotune(cache=tmp_path):
        p.call()
    assert clock.timed == []
    assert set(taken) == {FAST}
    assert [path.name for path in tmp_path.glob("*.json")] == ["autotune-interpreter.json"]


def test_a_choice_that_is_no_candidate_is_made_again(clock: Clock, taken: list[str], tmp_path: Path) -> None:
    """A file can name tiles that would not fit, or anything else."""
    p = linear(MIDDLE, HALF)
    p.call()
    path = tmp_path / "autotune-interpreter.json"
    path.write_text(path.read_text().replace("32x16", "4096x4096"))
    forget()
    clock.timed.clear()
    with safe_kernels.autotune(cache=tmp_path):
        p.call()
    assert len(clock.timed) == 6
    assert taken[-1] == FAST
    assert "4096x4096" not in path.read_text()


def test_where_no_candidate_fits_the_table_serves_and_nothing_is_remembered(
    clock: Clock, taken: list[str], tmp_path: Path
) -> None:
    clock.broken = True
    linear(MIDDLE, HALF).call()
    assert taken[-1] == TABLES
    clock.broken = False
    clock.timed.clear()
    linear(MIDDLE, HALF).call()
    assert clock.timed == [], "what has failed once is not tried at every step"
    assert list(tmp_path.glob("*.json")) == []


def test_nothing_is_timed_while_a_cuda_graph_is_captured(
    clock: Clock, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = linear(MIDDLE, HALF)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        p.call()
        assert clock.timed == []
        assert set(taken) == {TABLES}
    p.call()
    assert clock.timed


def test_what_is_traced_is_not_timed() -> None:
    assert tuning.may_time(torch.empty(1))
    assert not tuning.may_time(torch.empty(1, device="meta"))
    with FakeTensorMode():
        assert not tuning.may_time(torch.empty(1, device="cuda"))
    p = linear(MIDDLE, DTYPES[0])
    compiled = torch.compile(lambda x: torch.tensor(tuning.may_time(x)), backend="eager")
    assert not compiled(p.x)


def test_every_candidate_of_every_kernel_is_run(clock: Clock) -> None:
    p = problem(MIDDLE, HALF, dropout_p=0.1)
    p.require(x=True, A=True, B=True)
    p.call(safe_kernels.lora).backward(p.grad)
    assert {label: clock.timed.count(label) for label in set(clock.timed)} == {
        f"{rows}x{columns}": 4 for rows, columns in SIZES
    }, "a sweep forward, another one backward, apply, input"


def test_a_bound_layer_is_one_op(clock: Clock, launches: list[str]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(18, 17)), config, autocast_adapter_dtype=False).bfloat16()
    x = torch.randn(20, 18, dtype=torch.bfloat16)
    stock = model(x)
    with safe_peft.bind(model):
        model(x).sum().backward()
        launches.clear()
        out = model(x)
        (row,) = safe_peft.explain(model)
    assert row.path == "safe_kernels::lora_linear"
    assert launches == ["_lora_sweep_kernel", "_lora_linear_kernel"]
    assert torch.allclose(out, stock, atol=2e-2)
