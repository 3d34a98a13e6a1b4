"""What `lora` refuses, and that the message names the argument, what it got and what would do."""

from __future__ import annotations

import pytest
import torch
from oracle import Problem, Shape, problem

import safe_kernels

SHAPE = Shape(6, 5, 4, 3)


def call(p: Problem, **changes) -> torch.Tensor:
    arguments = {"x": p.x, "base": p.base, "lora_A": p.A, "lora_B": p.B, "scaling": 1.0, **changes}
    return safe_kernels.lora(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"x": torch.ones(6, 9)}, ValueError, ["x", "9", "5", "lora_A"]),
        ({"x": torch.tensor(1.0)}, ValueError, ["x", "dimension"]),
        ({"base": torch.tensor(1.0)}, ValueError, ["base", "dimension"]),
        ({"base": torch.ones(6, 9)}, ValueError, ["base", "9", "4", "lora_B"]),
        ({"base": torch.ones(7, 4)}, ValueError, ["base", "7", "6"]),
        ({"base": torch.ones(1, 6, 4)}, ValueError, ["base", "x"]),
        ({"lora_A": torch.ones(5)}, ValueError, ["lora_A", "[r, d_in]", "[5]"]),
        ({"lora_A": torch.ones(2, 5)}, ValueError, ["lora_A", "lora_B", "2", "3"]),
        ({"lora_B": torch.ones(4, 3, 1)}, ValueError, ["lora_B", "[d_out, r]"]),
        ({"lora_B": torch.ones(4, 9)}, ValueError, ["lora_A", "lora_B", "9", "3"]),
        ({"x": torch.ones(6, 5, dtype=torch.int64)}, TypeError, ["x", "float32"]),
        ({"base": torch.ones(6, 4, dtype=torch.complex64)}, TypeError, ["base", "float32"]),
        ({"lora_A": torch.ones(3, 5, dtype=torch.bfloat16)}, TypeError, ["lora_A", "lora_B", "dtype"]),
        ({"lora_B": torch.ones(4, 3, dtype=torch.int8)}, TypeError, ["lora_B"]),
        ({"dropout_p": -0.1}, ValueError, ["dropout_p", "[0, 1]", "-0.1"]),
        ({"dropout_p": 1.5}, ValueError, ["dropout_p", "[0, 1]", "1.5"]),
        ({"dropout_p": float("nan")}, ValueError, ["dropout_p"]),
        ({"dropout_p": 0.1, "rng_state": torch.ones(3, dtype=torch.int64)}, ValueError, ["rng_state", "[2]", "[3]"]),
        ({"dropout_p": 0.1, "rng_state": torch.ones(2)}, TypeError, ["rng_state", "int64"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_message_says_what_is_wrong(changes: dict, kind: type[Exception], words: list[str]) -> None:
    with pytest.raises(kind) as error:
        call(problem(SHAPE), **changes)
    assert type(error.value) is kind
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("starts", "block_rows", "weight", "kind", "words"),
    [
        (torch.tensor([0]), 0, None, ValueError, ["block_rows", "1", "0"]),
        (torch.tensor([[0]]), 2, None, ValueError, ["block_starts", "dimension"]),
        (torch.tensor([0.0]), 2, None, TypeError, ["block_starts", "int64"]),
        (torch.tensor([-1]), 2, None, ValueError, ["block_starts", "-1"]),
        (torch.tensor([0, 6]), 2, None, ValueError, ["block_starts", "6"]),
        (torch.tensor([2**62]), 2, None, ValueError, ["block_starts"]),
        (torch.tensor([0]), 2, torch.ones(5), ValueError, ["row_weight", "[6]", "[5]"]),
        (torch.tensor([0]), 2, torch.ones(6, 1), ValueError, ["row_weight", "[6]"]),
    ],
)
def test_blocks(starts: torch.Tensor, block_rows: int, weight, kind: type[Exception], words: list[str]) -> None:
    p = problem(SHAPE)
    statistics = safe_kernels.AdapterStatistics(blocks=safe_kernels.RowBlocks(starts, block_rows, weight))
    with pytest.raises(kind) as error:
        p.call(safe_kernels.lora, statistics=statistics)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert statistics.sums.tolist() == [0.0] * 4


def test_a_huge_block_is_no_overflow() -> None:
    p = problem(SHAPE)
    blocks = safe_kernels.RowBlocks(torch.tensor([1]), 2**62)
    statistics = safe_kernels.AdapterStatistics(blocks=blocks)
    p.call(safe_kernels.lora, statistics=statistics)
    assert statistics.rows == SHAPE.rows - 1


def test_dropout_without_a_state_is_refused_by_the_op() -> None:
    p = problem(SHAPE)
    with pytest.raises(ValueError, match="rng_state"):
        torch.ops.safe_kernels.lora(*p.inputs, 1.0, 0.1)


def test_tensors_on_different_devices() -> None:
    p = problem(SHAPE)
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        call(p, x=p.x.to("meta"))


def test_backward_needs_x_for_the_adapters_gradients() -> None:
    p = problem(SHAPE)
    arguments = (p.A, p.B, 1.0, 0.0, None)
    with pytest.raises(ValueError, match="x is needed"):
        torch.ops.safe_kernels.lora_backward(p.grad, None, *arguments, [True, True, False])
    grad_x, grad_A, grad_B = torch.ops.safe_kernels.lora_backward(p.grad, None, *arguments, [True, False, False])
    assert grad_x.shape == p.x.shape
    assert grad_A.shape == grad_B.shape == (0,)


def test_forward_mode_is_refused() -> None:
    p = problem(SHAPE)
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(lambda x: call(p, x=x), (p.x,), (torch.ones_like(p.x),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_are_right_or_refused() -> None:
    p = problem(SHAPE)
    expected = torch.autograd.grad(call(p, lora_A=p.A.requires_grad_()).sum(), p.A)[0]
    p.A.requires_grad_(False)
    try:
        got = torch.func.grad(lambda A: call(p, lora_A=A).sum())(p.A)
    except RuntimeError:
        pass
    else:
        assert torch.allclose(got, expected)


def test_an_error_leaves_nothing_half_done() -> None:
    p = problem(SHAPE).require()
    with pytest.raises(ValueError, match="base"):
        call(p, base=torch.ones(6, 9))
    call(p).sum().backward()
    assert p.A.grad is not None
