"""`invertible`: what it lets through keeps the gradient exact, and what would not is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from norms import Norm, assert_results, norm, plain, truth
from oracle import DTYPES, Dtypes

from safe_kernels import invertible
from safe_kernels.inversion import LIMIT, marks
from safe_kernels.retention import announce_reader


def grad_of_x(p: Norm, retain_output: bool = True) -> torch.Tensor:
    """With a reader of the output, so that backward is made from the output where that is allowed."""
    out = p.call(retain_output)
    announce_reader(out)
    return torch.autograd.grad(out, p.x, p.grad)[0]


ONE_DTYPE = [dtypes for dtypes in DTYPES if dtypes.x == dtypes.adapter]


@pytest.mark.parametrize("aligned", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("dtypes", ONE_DTYPE, ids=str)
@pytest.mark.parametrize("shape", [(64, 33), (64, 384)], ids=str)
def test_at_the_limit_the_gradient_is_as_good_as_pytorchs(
    shape: tuple[int, int], dtypes: Dtypes, aligned: float
) -> None:
    p = norm("layer", shape, dtypes, ratio=0.99 * LIMIT, aligned=aligned).require("x")
    assert invertible(p.weight, p.bias)
    grad_x = grad_of_x(p)
    assert_results(p, {"x": grad_x})
    exact = truth(p).exact["x"]
    error, allowed = ((tensor.double() - exact).norm() for tensor in (grad_x, plain(p)["x"]))
    assert error <= 2 * allowed, "no allowance for roundings here: a mean over many elements has no luck"


@pytest.mark.parametrize("dtypes", [d for d in ONE_DTYPE if d.x != torch.float64], ids=str)
def test_far_beyond_the_limit_it_is_not(dtypes: Dtypes) -> None:
    """Were it as good, the limit would be needless."""
    p = norm("layer", (64, 384), dtypes, ratio=16 * LIMIT, aligned=1.0).require("x")
    assert not invertible(p.weight, p.bias)
    exact, incumbent = truth(p).exact["x"], plain(p)["x"]
    errors = []
    for retain_output in (True, False):
        grad_x = grad_of_x(p, retain_output)
        errors.append((grad_x.double() - exact).norm())
    allowed = (incumbent.double() - exact).norm()
    assert errors[0] > 4 * allowed
    assert errors[1] <= 2 * allowed


@pytest.mark.parametrize("value", [0.0, -0.0, torch.inf, torch.nan, 1e-40])
def test_a_weight_that_cannot_be_divided_by(value: float) -> None:
    weight = torch.ones(5)
    assert invertible(weight)
    weight[3] = value
    assert not invertible(weight)
    assert not invertible(weight, torch.zeros(5))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1.01 * LIMIT, -1.01 * LIMIT])
def test_a_bias_that_hides_its_weight(value: float) -> None:
    bias = torch.zeros(5)
    assert invertible(torch.ones(5), bias)
    bias[3] = value
    assert not invertible(torch.ones(5), bias)
    assert not invertible(None, bias)


def test_the_offset_belongs_to_the_weight() -> None:
    assert invertible(torch.zeros(5), weight_offset=1.0)
    assert not invertible(torch.full((5,), -1.0), weight_offset=1.0)
    assert not invertible(torch.tensor([1.0, -1.0]), None, 1.0)


def test_the_outputs_dtype_counts() -> None:
    weight = torch.full((5,), 1e-5)
    assert invertible(weight)
    assert invertible(weight, dtype=torch.bfloat16)
    assert not invertible(weight, dtype=torch.float16), "below float16's normal numbers"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_what_is_read_at_once_is_what_operations_find(dtype: torch.dtype, offset: float) -> None:
    """A strided weight, or dtypes that differ, are left to PyTorch's operations."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.rand(7, generator=generator) - offset).to(dtype)
        bias = (torch.rand(7, generator=generator) * (seed / 5)).to(dtype)
        spread = torch.stack([weight, weight], -1)[:, 0]
        assert not spread.is_contiguous()
        assert (
            invertible(weight, bias, offset)
            == invertible(spread, bias, offset)
            == invertible(weight.double(), bias, offset)
        )


def write_through_data(w: torch.Tensor) -> None:
    w.data.zero_()


def write_through_detach(w: torch.Tensor) -> None:
    w.detach().numpy()[0] = 0.0


def write_in_place(w: torch.Tensor) -> None:
    with torch.no_grad():
        w.zero_()


def other_data(w: torch.Tensor) -> None:
    w.data = torch.zeros(5)


def other_dtype(w: torch.Tensor) -> None:
    w.data = w.data.half()


@pytest.mark.parametrize("write", [write_through_data, write_through_detach, write_in_place, other_data, other_dtype])
def test_marks_change_with_every_write(write: Callable[[torch.Tensor], None]) -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    before = marks(weight)
    weight.untyped_storage()  # that Python has a handle of the memory says nothing
    assert before is not None
    assert before == marks(weight)
    write(weight)
    assert marks(weight) != before


def test_marks_tell_a_tensor_from_the_one_before_it() -> None:
    seen = set()
    for _ in range(10):
        weight = torch.nn.Parameter(torch.ones(5))
        seen.add(marks(weight))
        del weight
    assert len(seen) == 10


@pytest.mark.parametrize("alias", [lambda w: w.data, lambda w: w.detach(), lambda w: w.data.numpy()])
def test_there_are_no_marks_while_an_alias_lives(alias: Callable[[torch.Tensor], object]) -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    kept = alias(weight)
    assert marks(weight) is None
    del kept
    assert marks(weight) is not None


def test_marks_leave_a_tensor_as_it_is() -> None:
    layer = torch.nn.LayerNorm(5)
    marks(layer.weight)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for other in (torch.load(file)["weight"], copy.deepcopy(layer).weight, pickle.loads(pickle.dumps(layer)).weight):
        assert torch.equal(other, layer.weight)
        assert marks(other) != marks(layer.weight)


def test_nothing_to_invert() -> None:
    assert invertible(None)
    assert invertible(None, None)
    assert invertible(torch.ones(0), torch.ones(0))


def test_a_limit_of_ones_own() -> None:
    weight, bias = torch.ones(5), torch.full((5,), 7.0)
    assert not invertible(weight, bias)
    assert invertible(weight, bias, limit=8.0)


def test_parameters_are_looked_at_not_touched() -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    assert invertible(weight, torch.nn.Parameter(torch.zeros(5))) is True
    assert weight.grad is None


@pytest.mark.parametrize("retain_output", [True, False])
def test_a_zero_weight_needs_the_input(retain_output: bool) -> None:
    p = norm("rms").require("x")
    p.weight[3] = 0
    grad_x = grad_of_x(p, retain_output)
    if retain_output:
        assert not torch.isfinite(grad_x).all(), "which is why the caller has to ask `invertible`"
    else:
        assert_results(p, {"x": grad_x})
