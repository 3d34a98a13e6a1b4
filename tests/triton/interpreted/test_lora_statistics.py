"""The score from the Triton kernels: sums against the reference's, and 1 - CKA against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, one_minus_cka, problem, taking_turns

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks, reference
from safe_kernels.triton.runtime import configs

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
SHAPE = Shape(96, 24, 40, 5)
TRAINED = [dtypes for dtypes in DTYPES if dtypes.x != torch.float64]


BY_TILES_AND_AT_ONCE = (16, 128)


@pytest.fixture(params=BY_TILES_AND_AT_ONCE, ids=["by tiles", "at once"], autouse=True)
def most_rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _small_tiles: None) -> int:
    """Rows of the largest block that one program takes."""
    entries = configs.Config(request.param, 16, rank=16, terms=True), configs.Config(request.param, 16, rank=16)
    monkeypatch.setitem(configs.TABLE, "block_parts", (*entries, configs.NO_TILES))
    return request.param


def score(p: Problem, blocks: RowBlocks) -> AdapterStatistics:
    statistics = AdapterStatistics(blocks=blocks)
    p.call(safe_kernels.lora, statistics=statistics)
    return statistics


def realistic(dtypes: Dtypes, magnitude: float, shape: Shape = SHAPE) -> Problem:
    """Features with a falling spectrum, a mean, and tokens of unequal norms, as activations have."""
    p = problem(shape, dtypes)
    generator = torch.Generator().manual_seed(100)
    spectrum = torch.arange(1, shape.d_out + 1) ** -0.5
    norms = torch.exp(0.5 * torch.randn(shape.rows, 1, generator=generator))
    p.base = (torch.randn(shape.rows, shape.d_out, generator=generator) * spectrum * norms + 0.7).to(p.base.dtype)
    p.B = (magnitude * torch.randn(shape.d_out, shape.rank, generator=generator)).to(p.B.dtype)
    return p


@pytest.mark.parametrize(
    ("dtypes", "magnitude", "most_rows_at_once"),
    taking_turns(TRAINED, (1e-4, 1e-2, 1.0), BY_TILES_AND_AT_ONCE),
    indirect=["most_rows_at_once"],
    ids=str,
)
def test_against_the_definition(dtypes: Dtypes, magnitude: float) -> None:
    p, starts = realistic(dtypes, magnitude), [0, 48]
    got = score(p, RowBlocks(torch.tensor(starts), 40)).one_minus_cka()
    assert got == pytest.approx(one_minus_cka(p, starts, 40), rel=TOLERANCE[p.x.dtype])


@pytest.mark.parametrize(
    ("rank", "weighted", "most_rows_at_once"),
    taking_turns((1, 17, 70), (False, True), BY_TILES_AND_AT_ONCE),
    indirect=["most_rows_at_once"],
)
def test_the_sums_themselves(rank: int, weighted: bool) -> None:
    """Blocks that overlap, that begin anywhere, that run past the end, and rows that do not count."""
    p = realistic(DTYPES[0], 0.1, Shape(70, 17, 20, rank))
    weight = torch.from_numpy(np.random.default_rng(0).random(70) < 0.7) if weighted else None
    starts = torch.tensor([3, 10, 50])
    _, got = torch.ops.safe_kernels.lora(*p.inputs, 2.0, 0.0, None, starts, 33, weight)
    delta = 2.0 * (p.x.double() @ p.A.double().t() @ p.B.double().t())
    expected = reference.cka_sums(p.base, delta, starts, 33, weight)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert got[3] == expected[3]


@pytest.mark.parametrize(
    ("kind", "alignment", "most_rows_at_once"),
    taking_turns(
        [(DTYPES[0], 1), (DTYPES[0], -1), (DTYPES[2], 1), (DTYPES[4], -1)], (0.9, 0.999), BY_TILES_AND_AT_ONCE
    ),
    indirect=["most_rows_at_once"],
)
def test_an_adapter_that_scales_the_features_it_finds(kind: tuple[Dtypes, int], alignment: float) -> None:
    """K and E nearly parallel: only sums made from the same rows in good precision survive.

    In half precision the features have a mean, ten times as large as what varies, since products are centred.
    """
    (dtypes, sign), generator = kind, torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE.rows, SHAPE.d_in, generator=generator)
    A = torch.randn(SHAPE.rank, SHAPE.d_in, generator=generator) / SHAPE.d_in**0.5
    B = torch.randn(SHAPE.d_out, SHAPE.rank, generator=generator)
    aligned = (x @ A.t()) @ B.t()
    noise = torch.randn(SHAPE.rows, SHAPE.d_out, generator=generator) * aligned.std()
    base = alignment * aligned + (1 - alignment**2) ** 0.5 * noise
    if dtypes.x != torch.float32:
        base += 10 * aligned.std()
    half, adapter = dtypes.x, dtypes.adapter
    p = Problem(x.to(half), base.to(half), A.to(adapter), B.to(adapter), noise.to(half), sign * 0.1)
    got = score(p, RowBlocks(torch.tensor([0]), 96)).one_minus_cka()
    assert got == pytest.approx(one_minus_cka(p, [0], 96), rel=TOLERANCE[half])


def test_a_new_adapter_scores_exactly_zero() -> None:
    statistics = score(realistic(DTYPES[2], 0.0), RowBlocks.spread(SHAPE.rows, block_rows=32))
    assert statistics.one_minus_cka() == 0.0
    assert statistics.rows == 96


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_few_rows_as_in_the_reference(rows: int) -> None:
    p = realistic(DTYPES[0], 0.1, Shape(rows, 33, 20, 3))
    starts = torch.zeros(1 if rows else 0, dtype=torch.int64)
    _, got = torch.ops.safe_kernels.lora(*p.inputs, 2.0, 0.0, None, starts, 128, None)
    _, expected = reference.lora(*p.inputs, 2.0, 0.0, None, starts, 128, None)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("rank", "kernels"), [(5, {16: 6, 128: 3}), (40, {16: 6, 128: 6})])
def test_how_many_kernels_score(
    rank: int, kernels: dict[int, int], most_rows_at_once: int, launches: list[str]
) -> None:
    score(realistic(DTYPES[2], 0.1, Shape(96, 40, 56, rank)), RowBlocks.spread(96, block_rows=48))
    assert len([name for name in launches if "block" in name]) == kernels[most_rows_at_once]


def test_nothing_is_launched_when_not_asked_for(launches: list[str]) -> None:
    p = realistic(DTYPES[0], 0.1)
    p.call(safe_kernels.lora)
    assert len(launches) == 2


def test_padding_that_is_no_number_does_not_count() -> None:
    p = realistic(DTYPES[0], 0.1)
    weight = torch.arange(SHAPE.rows) % 5 != 0
    clean = score(p, RowBlocks(torch.tensor([0]), 64, weight)).sums
    p.x[::5], p.base[::5] = torch.nan, torch.inf
    assert torch.equal(score(p, RowBlocks(torch.tensor([0]), 64, weight)).sums, clean)


def test_a_block_has_no_more_rows_than_elsewhere(launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.TABLE, "lora_sweep", (configs.Config(4096, block_k=16),))
    monkeypatch.setitem(configs.TABLE, "lora_apply", (configs.Config(4096, 16),))
    p = problem(Shape(9000, 1, 1, 1))
    message = "block_rows must be at most 8192, since a block takes two matrices of its rows squared, got 9000"
    with pytest.raises(ValueError, match=message):
        torch.ops.safe_kernels.lora(*p.inputs, 2.0, 0.0, None, torch.tensor([0]), 9000)
    assert not [kernel for kernel in launches if "block" in kernel]
