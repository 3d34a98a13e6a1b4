"""Whatever is passed to an op, the answer is the formula's or an error of Python's that says why; never a crash.

`pytest tests/robustness/test_kernel_ops.py --hypothesis-profile=thorough` tries thousands of cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_DTYPES = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
PYTHON_ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError)
VALUES = [0.0, -0.0, 1.0, -2.5, 1e-40, 6e4, float("inf"), float("-inf"), float("nan")]
HUGE = [*VALUES, -3e38]


@st.composite
def tensors(
    draw: Any, features: int | None = None, dtypes: list[torch.dtype] = DTYPES, values: list[float] = HUGE
) -> Tensor:
    """Any shape with a last dimension, any strides that a view can have, ordinary values with a few hostile ones."""
    rows = draw(st.lists(st.integers(0, 4), max_size=3))
    shape = [*rows, features if features is not None else draw(st.integers(0, 9))]
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    x = torch.randn([2 * size for size in shape], generator=generator)
    for place in draw(st.lists(st.integers(0, 10**6), max_size=2)):
        if x.numel():
            x.view(-1)[place % x.numel()] = draw(st.sampled_from(values))
    x = x.to(dtype)[tuple(slice(None, None, 2) for _ in shape)]  # strided, and not at the storage's start if flipped
    how = draw(st.sampled_from(["strided", "contiguous", "transposed", "expanded"]))
    if how == "contiguous":
        x = x.contiguous()
    elif how == "transposed" and x.dim() >= 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif how == "expanded" and x.dim() >= 2 and x.shape[0]:
        x = x[:1].expand(x.shape)
    return x


def outcome(call: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return call()
    except PYTHON_ERRORS as error:
        assert str(error).strip(), "an error says what is wrong"
        return error


def assert_same(ours: Tensor | Exception, formula: Tensor | Exception) -> None:
    """The same numbers up to rounding, NaN and Inf in the same places; or errors from both."""
    if isinstance(formula, Exception) or isinstance(ours, Exception):
        assert isinstance(ours, Exception) and isinstance(formula, Exception), (ours, formula)
        return
    assert (ours.shape, ours.dtype) == (formula.shape, formula.dtype)
    rtol = 0.05 if ours.dtype in (torch.bfloat16, torch.float16) else 1e-3
    assert torch.equal(ours.isnan(), formula.isnan())
    finite = ours.isfinite() & formula.isfinite()
    assert torch.equal(ours[~finite & ~ours.isnan()].sign(), formula[~finite & ~formula.isnan()].sign())
    torch.testing.assert_close(
        ours[finite].double(), formula[finite].double(), rtol=rtol, atol=0.05, check_stride=False
    )


@given(st.data(), st.integers(0, 5), st.integers(0, 7), st.integers(0, 9))
def test_lora_is_its_formula_whatever_is_in_its_tensors(data: Any, r: int, d_in: int, d_out: int) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    x = data.draw(tensors(d_in, [dtype], VALUES))  # beyond, the order of products decides what overflows
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(*x.shape[:-1], d_out, generator=generator).to(dtype)
    A, B = torch.randn(r, d_in, generator=generator).to(dtype), torch.randn(d_out, r, generator=generator).to(dtype)
    scaling = data.draw(st.sampled_from([0.0, 1.0, -2.0]))
    before = x.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = outcome(lambda: safe_kernels.lora(x, base, A, B, scaling))
    assert_same(ours, outcome(lambda: (base + scaling * (x.to(wide) @ A.to(wide).mT) @ B.to(wide).mT).to(dtype)))
    assert torch.equal(torch.nan_to_num(before), torch.nan_to_num(x)), "inputs are read only"


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: safe_kernels.rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype), 1e-6),
    "layer_norm": lambda x: safe_kernels.layer_norm(x, None, None, 1e-6),
    "gelu": lambda x: safe_kernels.activation(x, "gelu"),
    "silu": lambda x: safe_kernels.activation(x, "silu"),
    "relu": lambda x: safe_kernels.activation(x, "relu"),
    "gated": lambda x: safe_kernels.gated_activation(x, x, "silu"),
    "dropout": lambda x: safe_kernels.dropout(x, 0.0),
}
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype),
    "gelu": lambda x: torch.nn.functional.gelu(x.float()).to(x.dtype),
    "silu": lambda x: torch.nn.functional.silu(x.float()).to(x.dtype),
    "relu": lambda x: torch.relu(x),
    "gated": lambda x: (torch.nn.functional.silu(x.float()) * x.float()).to(x.dtype),
    "dropout": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "gated", "dropout"])
@given(x=tensors())
def test_elementwise_ops_are_their_formulas_whatever_is_in_them(name: str, x: Tensor) -> None:
    assume(x.dtype != torch.float64)
    ours, formula = outcome(lambda: UNARY[name](x)), outcome(lambda: FORMULAS[name](x))
    if isinstance(ours, Tensor) and isinstance(formula, Tensor):
        odd = ~x.isfinite()  # at infinity PyTorch's own kernels differ from one another: x * sigmoid(x) is nan or 0
        assert torch.equal(ours.isnan()[~odd], formula.isnan()[~odd])
        ours, formula = ours.masked_fill(odd, 0.0), formula.masked_fill(odd, 0.0)
    assert_same(ours, formula)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
@given(x=tensors())
def test_a_row_of_a_norm_depends_on_no_other(name: str, x: Tensor) -> None:
    assume(x.shape[-1] > 0)
    ours = outcome(lambda: UNARY[name](x))
    assert isinstance(ours, Tensor)
    rows, outs = x.reshape(-1, x.shape[-1]), ours.reshape(-1, x.shape[-1])
    for row, out in zip(rows, outs, strict=True):
        assert bool(out.isfinite().all()) or not bool((row.float().abs() < 1e19).all())


@pytest.mark.parametrize("name", list(UNARY))
@given(x=tensors(dtypes=ODD_DTYPES))
def test_other_dtypes_are_refused_by_name(name: str, x: Tensor) -> None:
    error = outcome(lambda: UNARY[name](x))
    assert isinstance(error, Exception), f"{name} took {x.dtype}"


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.lists(st.integers())
)


@given(st.data())
def test_anything_at_all_in_an_argument_gives_an_answer_or_an_error(data: Any) -> None:
    x, base = torch.randn(6, 4), torch.randn(6, 5)
    arguments = {"x": x, "base": base, "lora_A": torch.randn(2, 4), "lora_B": torch.randn(5, 2), "scaling": 1.0}
    arguments |= {"dropout_p": 0.0, "statistics": None, "rng_state": None}
    name = data.draw(st.sampled_from(sorted(arguments)))
    arguments[name] = data.draw(st.one_of(ANYTHING, tensors(), tensors(dtypes=ODD_DTYPES)))
    found = outcome(lambda: safe_kernels.lora(**arguments))
    if isinstance(found, Tensor):
        assert found.shape == base.shape or name == "base"


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), max_size=4),
    st.integers(-2, 2**62) | st.integers(0, 9),
)
def test_row_blocks_are_never_read_beyond_the_rows(starts: list[int], block_rows: int) -> None:
    x, base = torch.randn(8, 4), torch.randn(8, 5)

    def call() -> Tensor:
        blocks = RowBlocks(torch.tensor(starts, dtype=torch.int64), block_rows)
        statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64), blocks)
        return safe_kernels.lora(x, base, torch.randn(2, 4), torch.randn(5, 2), 1.0, statistics=statistics)

    found = outcome(call)
    inside = all(0 <= start < 8 for start in starts) and block_rows >= 1
    assert inside or isinstance(found, Exception) or not starts


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -1.0, 0.0, True])
def test_scaling_is_a_factor_and_nothing_more(scaling: float) -> None:
    x, base, A, B = torch.randn(3, 4), torch.randn(3, 5), torch.randn(2, 4), torch.randn(5, 2)
    expected = base + scaling * (x @ A.mT) @ B.mT
    torch.testing.assert_close(safe_kernels.lora(x, base, A, B, scaling), expected, equal_nan=True)


def test_nan_in_one_row_stays_in_that_row() -> None:
    x, base, A, B = torch.randn(70, 16), torch.randn(70, 24), torch.randn(4, 16), torch.randn(24, 4)
    x[33, 5] = float("nan")
    out = safe_kernels.lora(x, base, A, B, 2.0)
    assert out[33].isnan().all() and out.isnan().sum() == out.shape[1]


def test_a_saved_tensor_that_changed_is_noticed_in_backward() -> None:
    x, A = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    out = safe_kernels.lora(x, torch.randn(3, 5), A, torch.randn(5, 2), 1.0)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_huge_tensors_without_memory_have_shapes() -> None:
    x, base = torch.empty(2**20, 2**14, device="meta"), torch.empty(2**20, 2**12, device="meta")
    A, B = torch.empty(8, 2**14, device="meta"), torch.empty(2**12, 8, device="meta")
    assert safe_kernels.lora(x, base, A, B, 1.0).shape == base.shape
    assert reference.lora(x, base, A, B, 1.0)[0].shape == base.shape


def test_rows_without_features_are_not_walked() -> None:
    rows, one = 2**40, torch.empty(0)
    x = one.as_strided((rows, 0), (0, 1))
    out = safe_kernels.lora(x, x, torch.empty(2, 0), torch.empty(0, 2), 1.0)
    assert out.shape == (rows, 0)


def test_a_block_whose_gram_matrices_would_not_fit_is_refused() -> None:
    x, base = torch.ones(9000, 1), torch.ones(9000, 1)
    statistics = AdapterStatistics(torch.zeros(4, dtype=torch.float64), RowBlocks(torch.tensor([0]), 9000))
    with pytest.raises(ValueError, match="block_rows"):
        safe_kernels.lora(x, base, torch.ones(1, 1), torch.ones(1, 1), 1.0, statistics=statistics)


@pytest.mark.parametrize("name", ["bias", "x", "dropout"])
def test_inference_mode_checks_as_much(name: str) -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    A, B = torch.randn(2, 4), torch.randn(5, 2)
    with torch.inference_mode(), pytest.raises(PYTHON_ERRORS):
        if name == "dropout":
            torch.ops.safe_kernels.lora_linear(x, weight, bias, A, B, 1.0, 0.5, None, None, 0, None)
        else:
            bad = {"bias": (x, weight, bias[:1]), "x": (x.int(), weight, bias)}[name]
            safe_kernels.lora_linear(*bad, A, B, 1.0)


@pytest.mark.parametrize("argument", ["x", "base", "lora_A"])
def test_what_is_not_dense_is_named(argument: str) -> None:
    arguments = {"x": torch.randn(3, 4), "base": torch.randn(3, 5), "lora_A": torch.randn(2, 4)}
    arguments[argument] = arguments[argument].to_sparse()
    with pytest.raises(TypeError, match=argument):
        safe_kernels.lora(**arguments, lora_B=torch.randn(5, 2), scaling=1.0)


def test_a_factor_that_trains_is_refused_rather_than_left_without_its_gradient() -> None:
    scaling = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match="scaling must be a number"):
        safe_kernels.lora(torch.randn(3, 4), torch.randn(3, 5), torch.randn(2, 4), torch.randn(5, 2), scaling)
