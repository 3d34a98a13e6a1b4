"""Dropout from Philox: the bits, their reproducibility, and that nothing but the seed decides them."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from oracle import Shape, keep_mask, philox, problem, rng_state, rounded

import safe_kernels
from safe_kernels import functional, reference

MIDDLE = Shape(37, 33, 20, 8)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_published_test_vectors(counter: tuple, key: tuple, words: tuple) -> None:
    assert tuple(int(word) for word in philox(list(counter), list(key))) == words
    as_tensors = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in as_tensors) == words


def kept_by_the_op(rows: int, columns: int, dropout_p: float, state: torch.Tensor) -> np.ndarray:
    """Reads the mask off the op: with A = B = identity and base = 0, out is x with dropout."""
    x, eye = torch.ones(rows, columns), torch.eye(columns)
    out = safe_kernels.lora(x, torch.zeros(rows, columns), eye, eye, 1.0, dropout_p=dropout_p, rng_state=state)
    scale = 1 / (1 - rounded(dropout_p))
    kept = out.numpy() != 0
    np.testing.assert_allclose(out.numpy(), kept * scale, rtol=1e-6)
    return kept


def kept_by_the_reference(rows: int, columns: int, dropout_p: float, state: torch.Tensor) -> np.ndarray:
    return reference.dropout_keep(rows, columns, dropout_p, state).numpy()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 384])
def test_the_mask_bit_for_bit(columns: int, dropout_p: float) -> None:
    state = rng_state(columns)
    expected = keep_mask(70, columns, dropout_p, state)
    assert np.array_equal(kept_by_the_op(70, columns, dropout_p, state), expected)
    assert np.array_equal(kept_by_the_reference(70, columns, dropout_p, state), expected)


@pytest.mark.parametrize("column", [0, 1, 6, 7, 13, 30])
def test_the_threshold_itself_is_kept(column: int) -> None:
    """One probability on each side of an element's own 16 bits: few elements show it."""
    state = torch.tensor([11, 12])
    words = philox([np.arange(4), np.full(4, 2), 12, 0], [11, 0])
    bits = int(words[column // 2 % 4][column // 8]) >> 16 * (column % 2) & 0xFFFF
    assert 0 < bits < 2**16 - 1
    for kept in (kept_by_the_op, kept_by_the_reference):
        assert kept(3, 32, bits / 2**16, state)[2, column]
        assert not kept(3, 32, (bits + 1) / 2**16, state)[2, column]


@pytest.mark.parametrize(
    "dropout_p", [0.3 * 2**-16, 0.7 * 2**-16, 2**-16, 0.1, 1 / 3, 0.7, 1 - 1e-5, 1 - 2**-16, 1 - 2**-40]
)
def test_the_probability_is_rounded_for_mask_and_scale_alike(dropout_p: float) -> None:
    """So the expectation is the input even where rounding is coarse; only a probability of 1 drops everything."""
    threshold, scale = reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p)
    assert abs(threshold - dropout_p * 2**16) <= (0.5 if dropout_p < 1 - 2**-17 else 1)
    assert threshold < 2**16 and scale * (1 - threshold / 2**16) == pytest.approx(1, abs=2**-52)
    state = rng_state(7)
    kept = kept_by_the_op(40, 4096, dropout_p, state)
    assert np.array_equal(kept, keep_mask(40, 4096, dropout_p, state))
    assert np.array_equal(kept, kept_by_the_reference(40, 4096, dropout_p, state))
    assert kept.any() and kept.all() == (threshold == 0)


def test_all_is_dropped_at_1_alone() -> None:
    assert (reference.dropout_threshold(1.0), reference.dropout_scale(1.0)) == (2**16, 0.0)
    assert not kept_by_the_reference(9, 33, 1.0, rng_state(7)).any()
    assert not safe_kernels.dropout(torch.ones(9, 33), 1.0, rng_state=rng_state(7)).any()


@pytest.mark.parametrize("words", [(0, 0), (-1, -1), (1, 0), (0, 1), (2**40, -(2**40)), (-(2**63), 2**63 - 1)])
def test_all_64_bits_of_seed_and_offset_count(words: tuple[int, int]) -> None:
    state = torch.tensor(words)
    expected = keep_mask(9, 64, 0.5, state)
    assert np.array_equal(kept_by_the_op(9, 64, 0.5, state), expected)
    for i, bit in [(0, 1), (0, 2**32), (1, 1), (1, 2**32)]:
        other = state.clone()
        other[i] ^= bit
        assert not np.array_equal(keep_mask(9, 64, 0.5, other), expected)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.9])
def test_the_share_that_is_dropped(dropout_p: float) -> None:
    dropped = ~kept_by_the_op(2000, 256, dropout_p, rng_state(5))
    deviation = (dropout_p * (1 - dropout_p) / dropped.size) ** 0.5
    assert abs(dropped.mean() - dropout_p) < 5 * deviation
    # Neither rows nor columns share their fate.
    assert abs(dropped.mean(0) - dropout_p).max() < 6 * deviation * 256**0.5
    assert abs(dropped.mean(1) - dropout_p).max() < 6.5 * deviation * 2000**0.5 + 1 / 256


SHAPES = [shape for shape in oracle.shapes() if shape.rows in (1, 37, 130)][::2]


@pytest.mark.parametrize(
    ("shape", "dtypes", "dropout_p"), oracle.taking_turns(SHAPES, oracle.DTYPES, (0.1, 0.9, 1.0)), ids=str
)
def test_values_and_gradients(shape: Shape, dtypes: oracle.Dtypes, dropout_p: float) -> None:
    p = problem(shape, dtypes, dropout_p=dropout_p)
    oracle.assert_results(p, oracle.ours(p, safe_kernels.lora))


def test_the_row_is_the_flattened_row() -> None:
    p = problem(MIDDLE, leading=(5, 3), dropout_p=0.5)
    flat = safe_kernels.lora(
        p.x.flatten(0, 1), p.base.flatten(0, 1), p.A, p.B, p.scaling, dropout_p=0.5, rng_state=p.rng_state
    )
    assert torch.equal(p.call(safe_kernels.lora).flatten(0, 1), flat)


def test_all_dropped_is_the_base() -> None:
    p = problem(MIDDLE, dropout_p=1.0)
    assert torch.equal(p.call(safe_kernels.lora), p.base)


def test_zero_probability_draws_nothing_and_ignores_a_state() -> None:
    p = problem(MIDDLE)
    before = torch.get_rng_state()
    out = p.call(safe_kernels.lora)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(safe_kernels.lora(*p.inputs, p.scaling, dropout_p=0.0, rng_state=rng_state(1)), out)


def test_the_state_comes_from_torchs_generator() -> None:
    p = problem(MIDDLE)

    def draw() -> torch.Tensor:
        return safe_kernels.lora(*p.inputs, p.scaling, dropout_p=0.5)

    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    again, again_second = draw(), draw()
    assert torch.equal(first, again)
    assert torch.equal(second, again_second)
    assert not torch.equal(first, second), "every call has bits of its own"
    torch.manual_seed(8)
    assert not torch.equal(draw(), first)
    torch.manual_seed(7)
    state = functional.draw_rng_state(p.x.device)
    given = safe_kernels.lora(*p.inputs, p.scaling, dropout_p=0.5, rng_state=state)
    assert torch.equal(given, first)


def test_the_state_is_16_bytes_of_all_values() -> None:
    states = torch.stack([functional.draw_rng_state(torch.device("cpu")) for _ in range(500)])
    assert states.shape == (500, 2)
    assert states.dtype == torch.int64
    bits = (states[:, :, None] >> torch.arange(64)) & 1
    shares = bits.double().mean(0)
    assert ((shares > 0.35) & (shares < 0.65)).all(), "every bit is drawn, the sign and the lowest too"


def test_backward_uses_forwards_bits_whatever_is_drawn_in_between() -> None:
    p = problem(MIDDLE).require()
    torch.manual_seed(1)
    state = functional.draw_rng_state(p.x.device)
    p.dropout_p, p.rng_state = 0.5, state.clone()
    expected = torch.autograd.grad(p.call(safe_kernels.lora), p.inputs, p.grad)
    torch.manual_seed(1)
    out = safe_kernels.lora(*p.inputs, p.scaling, dropout_p=0.5)
    torch.manual_seed(99)
    torch.rand(1000)
    got = torch.autograd.grad(out, p.inputs, p.grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
