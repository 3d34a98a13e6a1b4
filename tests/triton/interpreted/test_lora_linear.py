"""`lora_linear` by its Triton kernels against the formulas."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from linears import Linear, assert_results, linear, results
from oracle import DTYPES, Dtypes, Shape, one_minus_cka, problem

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks
from safe_kernels.triton.runtime import configs

MIDDLE = Shape(37, 90, 77, 5)
SMALL = Shape(20, 50, 50, 5)
"""For many cases: fewer tiles, with a ragged end still."""
TRAINED = [dtypes for dtypes in DTYPES if dtypes.x != torch.float64]
FUSED, SWEEP, APPLY, INPUT = "_lora_linear_kernel", "_lora_sweep_kernel", "_lora_apply_kernel", "_lora_input_kernel"
FACTOR = ["_reduce_kernel", "_lora_input_kernel", "_reduce_kernel"]  # the other's parts, the product, its parts


@pytest.fixture(params=["library", "kernel"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _small_tiles: None) -> str:
    """Who multiplies by the weight: PyTorch, or the kernel that only tuning takes."""
    if request.param == "kernel":
        tiles = configs.Config(16, 16, block_k=16, warps=4, stages=1)
        monkeypatch.setitem(configs.TABLE, "lora_linear", (tiles,))
    return request.param


def check(p: Linear) -> None:
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", TRAINED, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float) -> None:
    check(linear(MIDDLE, dtypes, dropout_p=dropout_p))


SHAPES = [Shape(1, 1, 1, 1), Shape(0, 5, 4, 3), Shape(150, 20, 40, 17), Shape(20, 30, 10, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: Shape) -> None:
    """Among them more tiles of rows than one group has."""
    check(linear(shape, dropout_p=0.1, has_bias=False))


def test_any_strides() -> None:
    p = linear(MIDDLE, leading=(5, 7), dropout_p=0.2)
    p.x, p.grad, p.weight = p.x.transpose(0, 1), p.grad.transpose(0, 1), p.weight.t().contiguous().t()
    check(p)


NAMES = ("x", "weight", "bias", "A", "B")
SUBSETS = [names for count in range(len(NAMES) + 1) for names in combinations(NAMES, count)]


def backward_of(names: tuple[str, ...], form: str) -> list[str]:
    """What is launched: PyTorch's own products make the gradients of weight and bias."""
    wants_x, wants_A, wants_B = (name in names for name in ("x", "A", "B"))
    together = wants_x or wants_A  # one pass over grad makes the gradients of h and B, and one launch adds their parts
    sweeps = [SWEEP] * (together + wants_B) + (FACTOR[2:] if together else FACTOR) * wants_B
    factor = FACTOR[wants_B:]
    if form == "kernel":
        return sweeps + factor * wants_A + [FUSED] * wants_x
    at_x = factor[:-1] * (wants_x or wants_A) + [FACTOR[2]] * wants_A  # one pass makes both
    return sweeps + at_x


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_what_is_not_wanted_is_not_computed(names: tuple[str, ...], launches: list[str], form: str) -> None:
    p = linear(SMALL, DTYPES[4], dropout_p=0.2).require(*names)
    out = p.call()
    if names:
        out.backward(p.grad)
    grads = {name: tensor.grad for name, tensor in p.inputs.items() if tensor.grad is not None}
    assert set(grads) == set(names)
    assert_results(p, {"out": out.detach(), **grads})
    forward = [SWEEP, FUSED if form == "kernel" else APPLY]
    if "B" in names and not {"A", "weight"} & set(names):  # forward keeps h = dropout(x) A' in the place of x
        backward = [SWEEP, INPUT, FACTOR[2], *backward_of(tuple(set(names) - {"B"}), form)]
        assert launches == [*forward, SWEEP, APPLY, *backward]
    else:
        assert launches == [*forward, *backward_of(names, form)]


@pytest.mark.parametrize("magnitude", [1e-3, 1.0])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=str)
def test_the_score_with_the_roles_swapped(dtypes: Dtypes, magnitude: float) -> None:
    p = linear(Shape(96, 40, 56, 5), dtypes)
    p.B = p.B * magnitude
    statistics = AdapterStatistics(blocks=RowBlocks(torch.tensor([0, 48]), 40))
    p.call(statistics=statistics)
    truth = problem(Shape(96, 40, 56, 5), dtypes)
    truth.B, truth.base = p.B, (p.x.double() @ p.weight.double().t() + p.bias.double())
    tolerance = 1e-4 if dtypes.x == torch.float32 else 2e-2
    assert statistics.one_minus_cka() == pytest.approx(one_minus_cka(truth, [0, 48], 40), rel=tolerance)
    assert statistics.rows == 80


def test_a_new_adapter_scores_exactly_zero() -> None:
    p = linear(MIDDLE, DTYPES[2])
    p.B = torch.zeros_like(p.B)
    statistics = AdapterStatistics(blocks=RowBlocks.spread(37, block_rows=16))
    p.call(statistics=statistics)
    assert statistics.one_minus_cka() == 0.0


def test_inference_mode_is_checked_too() -> None:
    """It leaves out autograd, and with it the checks in C++."""
    p = linear(MIDDLE)
    with torch.inference_mode():
        assert torch.equal(p.call(), p.apply(**p.inputs))
        with pytest.raises(ValueError, match=r"weight must have shape \[77, 90\]"):
            safe_kernels.lora_linear(p.x, p.weight[:70], p.bias, p.A, p.B, 2.0)
        with pytest.raises(ValueError, match=r"base must have shape \[37, 77\]"):
            safe_kernels.lora(p.x, p.grad[:30], p.A, p.B, 2.0)
        with pytest.raises(ValueError, match=r"bias must have shape \[77\]"):
            safe_kernels.lora_linear(p.x, p.weight, p.bias[:7], p.A, p.B, 2.0)
        for starts, weight, message in (
            (torch.zeros(1), None, r"block_starts must be int64 \[n\], got torch.float32 \[1\]"),
            (torch.zeros(1, dtype=torch.int64), torch.ones(36), r"row_weight must have shape \[37\], got \[36\]"),
        ):
            with pytest.raises(ValueError, match=message):
                torch.ops.safe_kernels.lora_linear(
                    p.x, p.weight, p.bias, p.A, p.B, 2.0, block_starts=starts, block_rows=8, row_weight=weight
                )
