"""Values of `lora`, over strides and special numbers; over shapes and dtypes in test_lora_backward.py."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, assert_results, keep_mask, problem

import safe_kernels
from safe_kernels import reference

MIDDLE = Shape(37, 33, 20, 8)


def check(p: Problem) -> None:
    assert_results(p, {"out": p.call(safe_kernels.lora)})


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values_at_a_real_models_size(dtypes: Dtypes) -> None:
    rows = 64 if dtypes.x == torch.float64 else 1024
    check(problem(Shape(rows, 384, 1536, 8), dtypes))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_reference_agrees_too(dtypes: Dtypes) -> None:
    p = problem(MIDDLE, dtypes, dropout_p=0.1)
    out, statistics = reference.lora(*p.inputs, p.scaling, p.dropout_p, p.rng_state)
    assert_results(p, {"out": out})
    assert statistics.shape == (0,)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 5), (2, 3, 4), (1, 1, 1, 6), (3, 0, 2)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    p = problem(MIDDLE, leading=leading)
    out = p.call(safe_kernels.lora)
    assert out.shape == (*leading, MIDDLE.d_out)
    check(p)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


def strided(t: torch.Tensor) -> torch.Tensor:
    wide = torch.full((t.shape[0], 2 * t.shape[1]), torch.nan, dtype=t.dtype)
    wide[:, ::2] = t
    return wide[:, ::2]


def offset(t: torch.Tensor) -> torch.Tensor:
    """Contiguous rows that start in the middle of a storage, at an address no vector load likes."""
    longer = torch.full((t.numel() + 3,), torch.nan, dtype=t.dtype)
    longer[3:] = t.flatten()
    return longer[3:].view(t.shape)


def expanded_rows(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand(t.shape)


def expanded_columns(t: torch.Tensor) -> torch.Tensor:
    return t[:, :1].expand(t.shape)


VIEWS = [transposed, strided, offset, expanded_rows, expanded_columns]


@pytest.mark.parametrize("view", VIEWS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("argument", ["x", "base", "A", "B"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
def test_any_strides(argument: str, view, dtypes: Dtypes) -> None:
    p = problem(MIDDLE, dtypes)
    setattr(p, argument, view(getattr(p, argument)))
    check(p)


def test_everything_strided_at_once_in_three_dimensions() -> None:
    p = problem(MIDDLE, leading=(5, 7))
    p.x, p.base, p.grad = (tensor.transpose(0, 1) for tensor in (p.x, p.base, p.grad))
    p.A, p.B = transposed(p.A), strided(p.B)
    assert not p.x.is_contiguous()
    check(p)


def test_output_is_new_contiguous_memory() -> None:
    p = problem(MIDDLE)
    before = [tensor.clone() for tensor in p.inputs]
    out = p.call(safe_kernels.lora)
    assert out.is_contiguous()
    assert out.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in p.inputs}
    out.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(before, p.inputs, strict=True)), "an input was written to"


@pytest.mark.parametrize("scaling", [0.0, -1.5, 1e-3, 1e4])
def test_scaling(scaling: float) -> None:
    check(problem(MIDDLE, scaling=scaling))


def test_zero_scaling_and_a_new_adapter_give_the_base_bit_for_bit() -> None:
    p = problem(MIDDLE)
    assert torch.equal(safe_kernels.lora(*p.inputs, 0.0), p.base)
    assert torch.equal(safe_kernels.lora(p.x, p.base, p.A, torch.zeros_like(p.B), 2.0), p.base)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_same_bits_twice_and_on_two_threads(dtypes: Dtypes) -> None:
    p = problem(Shape(1000, 384, 384, 17), dtypes, dropout_p=0.1)
    first, second = p.call(safe_kernels.lora), p.call(safe_kernels.lora)
    torch.set_num_threads(2)
    third = p.call(safe_kernels.lora)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[4]], ids=str)
def test_special_numbers_stay_in_their_row(special: float, dtypes: Dtypes) -> None:
    p = problem(MIDDLE, dtypes)
    clean = p.call(safe_kernels.lora)
    p.x[5, 2] = special
    out = p.call(safe_kernels.lora)
    others = torch.arange(MIDDLE.rows) != 5
    assert torch.equal(out[others], clean[others])
    assert not torch.isfinite(out[5]).any()
    wide = torch.float64  # in bf16 PyTorch itself may spread nan to another row
    x, base, A, B = (tensor.detach().to(wide) for tensor in p.inputs)
    assert torch.equal(torch.isnan(out), torch.isnan(base + p.scaling * x @ A.t() @ B.t()))


def test_infinity_meets_a_new_adapter_as_in_pytorch() -> None:
    p = problem(MIDDLE)
    p.x[5, 2] = torch.inf
    p.B.zero_()
    out = p.call(safe_kernels.lora)
    assert torch.isnan(out[5]).all(), "inf * 0 is nan: a zero adapter must not hide a diverged activation"


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_a_kept_nan_is_seen_through_dropout(dropout_p: float) -> None:
    p = problem(MIDDLE, dropout_p=dropout_p)
    keep = keep_mask(MIDDLE.rows, MIDDLE.d_in, dropout_p, p.rng_state)
    column = int(keep[5].argmax())
    p.x[5, column] = torch.nan
    out = p.call(safe_kernels.lora)
    assert torch.isnan(out[5]).all()
    assert torch.isfinite(out[torch.arange(MIDDLE.rows) != 5]).all()


@pytest.mark.parametrize("shape", [Shape(7, 0, 5, 3), Shape(7, 6, 5, 0), Shape(0, 6, 5, 0)], ids=str)
def test_nothing_to_add_gives_the_base(shape: Shape) -> None:
    p = problem(Shape(shape.rows, 6, 5, 3))
    x, A, B = p.x[:, : shape.d_in], p.A[: shape.rank, : shape.d_in], p.B[:, : shape.rank]
    assert torch.equal(safe_kernels.lora(x, p.base, A, B, 2.0), p.base)


def test_no_output_features() -> None:
    p = problem(MIDDLE)
    assert safe_kernels.lora(p.x, p.base[:, :0], p.A, p.B[:0], 2.0).shape == (37, 0)


def test_x_and_base_of_different_precision_as_under_autocast() -> None:
    p = problem(MIDDLE)
    p.base = p.base.bfloat16()
    out = p.call(safe_kernels.lora)
    assert out.dtype == torch.bfloat16
    assert_results(p, {"out": out})
