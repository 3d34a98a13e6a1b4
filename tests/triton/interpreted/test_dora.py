"""`dora` by PyTorch's products and the Triton kernels of `dropout` and `lora`, against the formulas."""

from __future__ import annotations

import pytest
import torch
from doras import Dora, dora
from linears import assert_results, results
from oracle import DTYPES, Dtypes, Shape

from safe_kernels.triton import dora as host

MIDDLE = Shape(37, 90, 77, 5)
TRAINED = [dtypes for dtypes in DTYPES if dtypes.x != torch.float64]


def check(p: Dora, *left_out: str) -> None:
    found = results(p, p.apply)
    assert_results(p, {name: value for name, value in found.items() if name not in left_out})


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", TRAINED, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float) -> None:
    """The product for the gradient of the magnitude has the dtype of x, even if the adapter's is wider."""
    p = dora(MIDDLE, dtypes, dropout_p=dropout_p)
    mixed = dtypes.x != dtypes.adapter
    check(p, *(["magnitude"] if mixed else []))
    if mixed:
        rounded = dora(MIDDLE, Dtypes(dtypes.x, dtypes.x), dropout_p=dropout_p)
        assert_results(rounded, {"magnitude": results(p, p.apply)["magnitude"].to(dtypes.x)})


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(0, 5, 4, 3), Shape(150, 20, 40, 17)], ids=str)
def test_shapes(shape: Shape, launches: list[str]) -> None:
    check(dora(shape, dropout_p=0.1, has_bias=False))
    assert {"_lora_apply_kernel", "_dropout_kernel"} <= set(launches) or shape.rows == 0


def test_the_norm_of_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NORM_ELEMENTS", 200)
    check(dora(MIDDLE))


def test_any_strides() -> None:
    p = dora(MIDDLE, leading=(5, 7), dropout_p=0.2)
    p.x, p.grad, p.weight = p.x.transpose(0, 1), p.grad.transpose(0, 1), p.weight.t().contiguous().t()
    check(p)
