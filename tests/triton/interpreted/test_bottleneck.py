"""`bottleneck` by the Triton kernels of `lora` and `activation`, against the formulas."""

from __future__ import annotations

import pytest
import torch
from bottlenecks import assert_results, bottleneck, results
from oracle import DTYPES, Dtypes, Shape

from safe_kernels import AdapterStatistics, RowBlocks, reference

MIDDLE = Shape(37, 90, 77, 12)
TRAINED = [dtypes for dtypes in DTYPES if dtypes.x != torch.float64]


@pytest.mark.parametrize(("kind", "dropout_p"), [("relu", 0.0), ("gelu", 0.3), ("silu", 0.0)])
@pytest.mark.parametrize("dtypes", TRAINED, ids=str)
def test_values(dtypes: Dtypes, kind: str, dropout_p: float) -> None:
    p = bottleneck(MIDDLE, dtypes, kind=kind, dropout_p=dropout_p)
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 1), Shape(0, 5, 4, 3), Shape(150, 20, 40, 17)], ids=str)
def test_shapes(shape: Shape, launches: list[str]) -> None:
    p = bottleneck(shape, dropout_p=0.1)
    assert_results(p, results(p, p.apply))
    assert {"_lora_apply_kernel", "_gated_activation_kernel"} <= set(launches) or shape.rows == 0


def test_any_strides() -> None:
    p = bottleneck(MIDDLE, leading=(5, 7), dropout_p=0.2)
    p.x, p.grad, p.residual = (t.transpose(0, 1) for t in (p.x, p.grad, p.residual))
    p.W_down, p.W_up = p.W_down.t().contiguous().t(), p.W_up.t().contiguous().t()
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("names", [("x",), ("W_up",), ("b_up",), ("x", "W_up")], ids="+".join)
@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_frozen_parts(kind: str, names: tuple[str, ...]) -> None:
    p = bottleneck(MIDDLE, DTYPES[4], kind=kind).require(*names)
    out = p.call()
    out.backward(p.grad)
    assert_results(p, {"out": out.detach(), **{name: getattr(p, name).grad for name in names}})


def test_scores() -> None:
    p = bottleneck(Shape(200, 40, 30, 6))
    blocks = RowBlocks.spread(200, blocks=2, block_rows=64)
    found = AdapterStatistics(blocks=blocks)
    p.call(statistics=found)
    arguments = (*p.inputs.values(), p.kind, p.scaling, 0.0, None)
    sums = reference.bottleneck(*arguments, blocks.starts, blocks.block_rows, None)[-1]
    torch.testing.assert_close(found.sums, sums, rtol=1e-3, atol=0)
