"""The score: sums from the op against 1 - CKA by its definition, in extended precision, of the same rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, keep_mask, one_minus_cka, problem, rounded

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks, reference

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 2e-2}
SHAPE = Shape(512, 96, 80, 8)


def blocks_of(p: Problem, starts: list[int], block_rows: int, weight: np.ndarray | None = None) -> RowBlocks:
    return RowBlocks(torch.tensor(starts), block_rows, None if weight is None else torch.from_numpy(weight))


def score(p: Problem, blocks: RowBlocks) -> AdapterStatistics:
    statistics = AdapterStatistics(blocks=blocks)
    p.call(safe_kernels.lora, statistics=statistics)
    return statistics


def check(p: Problem, starts: list[int], block_rows: int, weight: np.ndarray | None = None, tolerance=None) -> float:
    expected = one_minus_cka(p, starts, block_rows, weight)
    got = score(p, blocks_of(p, starts, block_rows, weight)).one_minus_cka()
    tolerance = TOLERANCE[p.x.dtype] if tolerance is None else tolerance
    assert got == pytest.approx(expected, rel=tolerance), f"1 - CKA {got:.6e}, expected {expected:.6e}"
    return expected


def realistic(dtypes: Dtypes, magnitude: float, seed: int = 0, shape: Shape = SHAPE) -> Problem:
    """Features with a falling spectrum, a mean, and tokens of unequal norms, as activations have."""
    p = problem(shape, dtypes, seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    spectrum = torch.arange(1, shape.d_out + 1) ** -0.5
    norms = torch.exp(0.5 * torch.randn(shape.rows, 1, generator=generator))
    base = (torch.randn(shape.rows, shape.d_out, generator=generator) * spectrum * norms + 0.7).to(p.base.dtype)
    B = (magnitude * torch.randn(shape.d_out, shape.rank, generator=generator)).to(p.B.dtype)
    return Problem(p.x, base, p.A, B, p.grad, p.scaling)


@pytest.mark.parametrize("magnitude", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_against_the_definition(dtypes: Dtypes, magnitude: float) -> None:
    expected = check(realistic(dtypes, magnitude), [0, 128, 256, 384], 128)
    assert expected > 0


@pytest.mark.parametrize("shape", [Shape(256, 384, 384, 8), Shape(256, 384, 1536, 8), Shape(256, 33, 5, 17)], ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
def test_other_shapes(shape: Shape, dtypes: Dtypes) -> None:
    check(realistic(dtypes, 1e-3, shape=shape), [0, 128], 128)


@pytest.mark.parametrize("alignment", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_adapter_that_scales_the_features_it_finds(alignment: float, sign: int) -> None:
    """K and E nearly parallel: a c - b^2 cancels, and only sums made from the same rows in good precision survive."""
    p = realistic(DTYPES[0], 1.0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE.rows, SHAPE.d_in, generator=generator)
    A = torch.randn(SHAPE.rank, SHAPE.d_in, generator=generator) / SHAPE.d_in**0.5
    B = torch.randn(SHAPE.d_out, SHAPE.rank, generator=generator)
    aligned = (x @ A.t()) @ B.t()
    noise = torch.randn(SHAPE.rows, SHAPE.d_out, generator=generator) * aligned.std()
    base = alignment * aligned + (1 - alignment**2) ** 0.5 * noise
    p = Problem(x, base, A, B, p.grad, sign * 0.1)
    check(p, [0, 128, 256, 384], 128)


def test_a_new_adapter_scores_exactly_zero() -> None:
    for dtypes in DTYPES:
        p = realistic(dtypes, 0.0)
        statistics = score(p, RowBlocks.spread(SHAPE.rows))
        assert statistics.c == 0.0
        assert statistics.one_minus_cka() == 0.0
        assert statistics.rows == SHAPE.rows


def test_an_adapter_that_shifts_every_row_alike_scores_zero() -> None:
    """Centring: a constant added to the features is not a change of them."""
    p = realistic(DTYPES[1], 1.0)
    p.x = p.x[:1].expand(p.x.shape).contiguous()
    assert score(p, RowBlocks.spread(SHAPE.rows)).one_minus_cka() < 1e-12


@pytest.mark.parametrize("starts", [[0], [384], [0, 128, 256, 384], [7, 77, 300], [5, 60]])
@pytest.mark.parametrize("block_rows", [64, 50])
def test_any_blocks(starts: list[int], block_rows: int) -> None:
    p = realistic(DTYPES[0], 1e-2)
    check(p, starts, block_rows)


def test_a_ragged_last_block_is_cut() -> None:
    p = realistic(DTYPES[0], 1e-2, shape=Shape(300, 96, 80, 8))
    check(p, [0, 128, 256], 128)
    statistics = score(p, RowBlocks.spread(300, blocks=3))
    assert statistics.rows == 300
    assert score(p, blocks_of(p, [0], 1000)).rows == 300, "a block larger than the batch is the batch"


def test_overlapping_blocks_count_twice() -> None:
    p = realistic(DTYPES[0], 1e-2)
    one, two = score(p, blocks_of(p, [64], 64)), score(p, blocks_of(p, [64, 64], 64))
    assert torch.allclose(two.sums, 2 * one.sums, rtol=1e-12)


@pytest.mark.parametrize("kind", [np.bool_, np.float32, np.int64])
def test_padding_rows_weigh_nothing(kind: type) -> None:
    p = realistic(DTYPES[0], 1e-2)
    weight = (np.random.default_rng(0).random(SHAPE.rows) > 0.3).astype(kind)
    check(p, [0, 128, 256, 384], 128, weight)
    statistics = score(p, blocks_of(p, [0, 128, 256, 384], 128, weight))
    assert statistics.rows == np.count_nonzero(weight)


@pytest.mark.parametrize("garbage", [1e30, torch.nan, torch.inf])
def test_what_padding_rows_hold_does_not_matter(garbage: float) -> None:
    p = realistic(DTYPES[0], 1e-2)
    weight = np.arange(SHAPE.rows) % 128 < 90
    blocks = blocks_of(p, [0, 128, 256, 384], 128, weight)
    clean = score(p, blocks)
    p.x[torch.from_numpy(~weight)] = garbage
    p.base[torch.from_numpy(~weight)] = garbage
    assert torch.allclose(score(p, blocks).sums, clean.sums, rtol=1e-12)


def test_a_block_of_padding_alone_adds_nothing() -> None:
    p = realistic(DTYPES[0], 1e-2)
    weight = np.arange(SHAPE.rows) < 128
    with_padding = score(p, blocks_of(p, [0, 128], 128, weight))
    alone = score(p, blocks_of(p, [0], 128))
    assert torch.allclose(with_padding.sums, alone.sums, rtol=1e-12)
    assert with_padding.rows == 128


def test_rows_outside_the_blocks_do_not_matter() -> None:
    p = realistic(DTYPES[0], 1e-2)
    blocks = blocks_of(p, [128], 128)
    clean = score(p, blocks)
    p.x[:128], p.base[256:] = torch.nan, torch.nan
    assert torch.equal(score(p, blocks).sums, clean.sums)


def test_sums_are_additive() -> None:
    """Blocks, calls and micro-batches: one call over all equals several calls added."""
    p = realistic(DTYPES[0], 1e-2)
    whole = score(p, blocks_of(p, [0, 128, 256, 384], 128))
    parts = AdapterStatistics()
    for start in (0, 256):
        rows = slice(start, start + 256)
        part = Problem(p.x[rows], p.base[rows], p.A, p.B, p.grad[rows], p.scaling)
        parts.add_(score(part, blocks_of(part, [0, 128], 128)).sums)
    assert torch.allclose(parts.sums, whole.sums, rtol=1e-12)
    accumulated = AdapterStatistics(blocks=blocks_of(p, [0, 128, 256, 384], 128))
    for _ in range(2):  # activation checkpointing runs forward twice
        p.call(safe_kernels.lora, statistics=accumulated)
    assert torch.allclose(accumulated.sums, 2 * whole.sums, rtol=1e-12)
    assert accumulated.one_minus_cka() == pytest.approx(whole.one_minus_cka(), rel=1e-12)
    accumulated.zero_()
    assert accumulated.sums.tolist() == [0.0] * 4


def test_sums_are_those_of_the_definition() -> None:
    """Each sum by itself, so that a factor common to all of them cannot hide in the ratio."""
    p = realistic(DTYPES[0], 1e-1)
    statistics = score(p, blocks_of(p, [128], 128))
    X = p.base[128:256].double()
    Y = X + p.scaling * p.x[128:256].double() @ p.A.double().t() @ p.B.double().t()
    X, Y = X - X.mean(0), Y - Y.mean(0)
    K = X @ X.t()
    E = Y @ Y.t() - K
    expected = [(K * K).sum().item(), (K * E).sum().item(), (E * E).sum().item(), 128.0]
    assert statistics.sums.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_score_sees_the_features_that_training_sees(dropout_p: float) -> None:
    p = realistic(DTYPES[0], 1e-2)
    p.dropout_p, p.rng_state = dropout_p, torch.tensor([3, 4])
    keep = torch.from_numpy(keep_mask(SHAPE.rows, SHAPE.d_in, dropout_p, p.rng_state))
    x = p.x.double() * keep / (1 - rounded(dropout_p))
    dropped = Problem(x, p.base.double(), p.A.double(), p.B.double(), p.grad, 2.0)
    expected = one_minus_cka(dropped, [0, 128], 128)
    assert score(p, blocks_of(p, [0, 128], 128)).one_minus_cka() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_asking_for_statistics_changes_no_bit_of_the_output(dtypes: Dtypes, dropout_p: float) -> None:
    p = problem(SHAPE, dtypes, dropout_p=dropout_p)
    statistics = AdapterStatistics(blocks=RowBlocks.spread(SHAPE.rows))
    assert torch.equal(p.call(safe_kernels.lora, statistics=statistics), p.call(safe_kernels.lora))


def test_leading_dimensions_and_strides() -> None:
    p = realistic(DTYPES[0], 1e-2)
    expected = score(p, RowBlocks.spread(SHAPE.rows)).sums
    p.x, p.base = p.x.t().contiguous().t(), p.base.t().contiguous().t()
    assert torch.allclose(score(p, RowBlocks.spread(SHAPE.rows)).sums, expected, rtol=1e-6)
    p.x, p.base = p.x.reshape(4, 128, -1), p.base.reshape(4, 128, -1)
    assert torch.allclose(score(p, RowBlocks.spread(SHAPE.rows)).sums, expected, rtol=1e-6)


def test_same_bits_twice_and_on_two_threads() -> None:
    p = realistic(DTYPES[0], 1e-2)
    blocks = RowBlocks.spread(SHAPE.rows)
    first, second = score(p, blocks).sums, score(p, blocks).sums
    torch.set_num_threads(2)
    assert torch.equal(first, second)
    assert torch.equal(first, score(p, blocks).sums)


def test_reference_agrees() -> None:
    p = realistic(DTYPES[0], 1e-2)
    blocks = RowBlocks.spread(SHAPE.rows, blocks=3, block_rows=100)
    _, sums = reference.lora(*p.inputs, p.scaling, 0.0, None, blocks.starts, blocks.block_rows, None)
    assert torch.allclose(score(p, blocks).sums, sums, rtol=1e-4)


def test_nothing_asked_nothing_made() -> None:
    p = problem(SHAPE)
    _, sums = torch.ops.safe_kernels.lora(*p.inputs, 2.0)
    assert sums.shape == (0,)
    idle = AdapterStatistics()
    p.call(safe_kernels.lora, statistics=idle)
    assert idle.sums.tolist() == [0.0] * 4


def test_the_second_output_is_not_differentiable() -> None:
    p = problem(SHAPE).require()
    out, sums = torch.ops.safe_kernels.lora(*p.inputs, 2.0, 0.0, None, torch.tensor([0]), 128)
    assert out.requires_grad
    assert not sums.requires_grad
    assert sums.dtype == torch.float64
    assert sums.shape == (4,)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_to_score(rows: int) -> None:
    p = problem(Shape(rows, 9, 7, 2))
    statistics = AdapterStatistics(blocks=RowBlocks.spread(rows))
    p.call(safe_kernels.lora, statistics=statistics)
    assert statistics.rows == rows
    assert math.isnan(statistics.one_minus_cka())


def test_diverged_features_have_no_score() -> None:
    p = realistic(DTYPES[0], 1e-2)
    p.x[3, 4] = torch.nan
    assert math.isnan(score(p, RowBlocks.spread(SHAPE.rows)).one_minus_cka())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_features_does_not_matter(scale: float) -> None:
    p = realistic(DTYPES[1], 1e-2)
    expected = score(p, RowBlocks.spread(SHAPE.rows)).one_minus_cka()
    scaled = Problem(p.x, p.base * scale, p.A, p.B * scale, p.grad, p.scaling)
    assert score(scaled, RowBlocks.spread(SHAPE.rows)).one_minus_cka() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("num_rows", "blocks", "shift"), [(1000, 4, 0), (1000, 4, 5), (130, 4, 1), (5, 4, 0), (0, 4, 0)]
)
def test_spread_blocks_are_distinct_aligned_and_inside(num_rows: int, blocks: int, shift: int) -> None:
    starts = RowBlocks.spread(num_rows, blocks=blocks, shift=shift).starts
    assert len(starts) == len(set(starts.tolist())) == min(blocks, -(-num_rows // 128))
    assert ((starts % 128) == 0).all()
    assert ((starts >= 0) & (starts < max(num_rows, 1))).all()


def test_one_minus_cka_of_bad_sums() -> None:
    for sums in ([0.0, 0.0, 0.0], [math.nan, 1.0, 1.0], [1.0, math.inf, 1.0], [-1.0, 0.0, 1.0]):
        assert math.isnan(reference.one_minus_cka(torch.tensor(sums, dtype=torch.float64)))
    # E = K is a mere scaling; <K, K + E> = 0 is the other end.
    assert reference.one_minus_cka(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)) == 0.0
    assert reference.one_minus_cka(torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64)) == 1.0


def test_a_block_has_the_same_most_rows_whatever_scores_it() -> None:
    """The CPU kernel, the reference, and fake tensors; two matrices of its rows squared are what a block takes."""
    message = "block_rows must be at most 8192, since a block takes two matrices of its rows squared, got 9000"
    p = problem(Shape(9000, 1, 1, 1))
    starts = torch.tensor([0])
    with pytest.raises(ValueError, match=message):
        score(p, RowBlocks(starts, 9000))
    with pytest.raises(ValueError, match=message), torch.inference_mode():
        score(p, RowBlocks(starts, 9000))
    arguments = (p.x, p.base, p.A, p.B, 2.0, 0.0, None, starts, 9000)
    with pytest.raises(ValueError, match=message):
        reference.lora(*arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.safe_kernels.lora(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments))
    small = problem(Shape(20, 4, 5, 2))
    assert score(small, RowBlocks(starts, 9000)).rows == 20, "a block is no longer than the batch"
    assert float(reference.cka_sums(small.base, small.base, starts, 9000)[3]) == 20
