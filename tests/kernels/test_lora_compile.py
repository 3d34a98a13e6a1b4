"""The op as PyTorch's tools see it: opcheck, fake tensors, torch.compile."""

from __future__ import annotations

import shutil
from itertools import product

import pytest
import torch
from oracle import DTYPES, Dtypes, Problem, Shape, problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import safe_kernels

SHAPE = Shape(12, 9, 7, 3)
BLOCKS = (torch.tensor([0, 8]), 8, torch.arange(12) != 3)
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    ("flags", "dropout_p", "scored"),
    [
        ((False, False, False, False), 0.0, False),
        ((True, True, True, True), 0.0, False),
        ((True, True, True, True), 0.2, True),
        ((True, False, False, False), 0.2, False),
        ((False, False, True, False), 0.2, True),
        ((False, True, False, False), 0.0, True),
    ],
    ids=str,
)
def test_opcheck_lora(flags: tuple[bool, ...], dropout_p: float, scored: bool) -> None:
    p = problem(SHAPE, leading=(3, 4), dropout_p=dropout_p).require(*flags)
    arguments = (*p.inputs, 2.0, dropout_p, p.rng_state, *(BLOCKS if scored else ()))
    torch.library.opcheck(torch.ops.safe_kernels.lora.default, arguments)


@pytest.mark.parametrize(
    ("mask", "dtypes"),
    [
        ((True, True, True), DTYPES[0]),
        ((True, True, True), DTYPES[4]),
        ((True, False, False), DTYPES[0]),
        ((False, True, False), DTYPES[4]),
        ((False, False, True), DTYPES[0]),
    ],
    ids=str,
)
def test_opcheck_backward(mask: tuple[bool, ...], dtypes: Dtypes) -> None:
    p = problem(SHAPE, dtypes, dropout_p=0.2)
    x = p.x if mask[1] or mask[2] else None
    torch.library.opcheck(
        torch.ops.safe_kernels.lora_backward.default, (p.grad, x, p.A, p.B, 2.0, 0.2, p.rng_state, list(mask))
    )


@pytest.mark.parametrize("mask", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_fake_gradients_have_the_real_ones_metadata(dtypes: Dtypes, mask: tuple[bool, ...]) -> None:
    p = problem(SHAPE, dtypes, leading=(3, 4))
    tensors = (p.grad, p.x if mask[1] or mask[2] else None, p.A, p.B)
    real = torch.ops.safe_kernels.lora_backward(*tensors, 2.0, 0.0, None, list(mask))
    with FakeTensorMode() as mode:
        fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        fake = torch.ops.safe_kernels.lora_backward(*fakes, 2.0, 0.0, None, list(mask))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_fake_tensors_have_the_real_ones_metadata(dtypes: Dtypes, scored: bool) -> None:
    p = problem(SHAPE, dtypes, leading=(3, 4))
    p.x, p.base = p.x.transpose(0, 1), p.base.transpose(0, 1)
    blocks = BLOCKS if scored else ()
    real = torch.ops.safe_kernels.lora(*p.inputs, 2.0, 0.0, None, *blocks)
    with FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(tensor) for tensor in p.inputs]
        fake_blocks = [mode.from_tensor(b) if isinstance(b, torch.Tensor) else b for b in blocks]
        fake = torch.ops.safe_kernels.lora(*fake_inputs, 2.0, 0.0, None, *fake_blocks)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_meta_tensors() -> None:
    p = problem(SHAPE)
    x, base, A, B = (tensor.to("meta").requires_grad_() for tensor in p.inputs)
    out = safe_kernels.lora(x, base, A, B, 2.0)
    out.sum().backward()
    assert out.shape == p.base.shape
    assert x.grad.shape == x.shape
    assert A.grad.shape == A.shape


def layer(p: Problem, dropout_p: float):
    """A layer as a model would have it: a product before, an activation after."""
    weight = torch.randn(p.base.shape[-1], p.x.shape[-1])

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, rng_state: torch.Tensor | None) -> torch.Tensor:
        base = torch.nn.functional.linear(x, weight)
        return torch.relu(safe_kernels.lora(x, base, A, B, 2.0, dropout_p=dropout_p, rng_state=rng_state)).sum()

    return run


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
def test_compiled_whole(backend: str, dropout_p: float) -> None:
    torch._dynamo.reset()
    p = problem(SHAPE, dropout_p=dropout_p).require(base=False)
    run = layer(p, dropout_p)
    leaves = (p.x, p.A, p.B)
    expected = run(*leaves, p.rng_state)
    expected_grads = torch.autograd.grad(expected, leaves)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    got = compiled(*leaves, p.rng_state)
    grads = torch.autograd.grad(got, leaves)
    torch.testing.assert_close(got, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_draws_anew_each_call() -> None:
    torch._dynamo.reset()
    p = problem(SHAPE)
    run = torch.compile(layer(p, 0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    values = {run(p.x, p.A, p.B, None).item() for _ in range(4)}
    assert len(values) == 4
    torch.manual_seed(0)
    assert run(p.x, p.A, p.B, None).item() in values


def test_compiled_with_statistics() -> None:
    torch._dynamo.reset()
    p = problem(SHAPE).require()

    def run(x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        out, new = torch.ops.safe_kernels.lora(x, p.base, p.A, p.B, 2.0, 0.0, None, *BLOCKS)
        sums.add_(new)
        return out

    expected, got = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    eager = run(p.x, expected)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(p.x, got)
    assert torch.equal(eager, compiled)
    assert torch.equal(expected, got)
    assert got[3] == 11


def test_compiled_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    p = problem(SHAPE).require(base=False)
    run = layer(p, 0.0)
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=frames, dynamic=True)
    counts = []
    for rows in (5, 12, 33):
        x = torch.randn(rows, SHAPE.d_in)
        torch.testing.assert_close(compiled(x, p.A, p.B, None), run(x, p.A, p.B, None))
        counts.append(frames.frame_count)
    assert len(set(counts)) == 1, "another number of rows must not compile anew"
