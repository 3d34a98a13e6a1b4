"""The norms as PyTorch's tools see them: opcheck, fake tensors, torch.compile."""

from __future__ import annotations

import shutil

import pytest
import torch
from norms import KINDS, Norm, backward_op, norm, results
from oracle import DTYPES, Dtypes, taking_turns
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPE = (3, 4, 9)
BOTH = ("rms", "layer")
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
ops = torch.ops.safe_kernels


@pytest.mark.parametrize(
    ("names", "retain_output"),  # which counts where x alone has a gradient
    [((), True), (("x",), True), (("x",), False), (("x", "weight", "bias"), False), (("weight",), True)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["rms-offset", "layer"])
def test_opcheck(kind: str, names: tuple[str, ...], retain_output: bool) -> None:
    p = norm(kind, SHAPE).require(*names)
    if kind == "layer":
        torch.library.opcheck(ops.layer_norm.default, (p.x, p.weight, p.bias, p.eps, retain_output))
    else:
        torch.library.opcheck(ops.rms_norm.default, (p.x, p.weight, p.eps, p.offset, retain_output))


@pytest.mark.parametrize(
    ("from_output", "mask", "dtypes"),
    taking_turns(
        (True, False), ((True, True, True), (True, False, False), (False, True, True)), (DTYPES[0], DTYPES[4])
    ),
    ids=str,
)
def test_opcheck_backward(from_output: bool, mask: tuple[bool, ...], dtypes: Dtypes) -> None:
    p = norm("rms", SHAPE, dtypes)
    out, rstd = ops.rms_norm(p.x, p.weight, p.eps)
    arguments = (p.grad, out if from_output else p.x, p.weight, rstd, 0.0, from_output, list(mask[:2]))
    torch.library.opcheck(ops.rms_norm_backward.default, arguments)
    p = norm("layer", SHAPE, dtypes)
    out, mean, rstd = ops.layer_norm(p.x, p.weight, p.bias, p.eps)
    retained = (out, p.weight, p.bias, None) if from_output else (p.x, p.weight, p.bias, mean)
    torch.library.opcheck(ops.layer_norm_backward.default, (p.grad, *retained, rstd, from_output, list(mask)))


def metadata(p: Norm, from_output: bool, mask: list[bool]) -> list[tuple]:
    if p.kind.startswith("rms"):
        forward = ops.rms_norm(p.x, p.weight, p.eps)
    else:
        forward = ops.layer_norm(p.x, p.weight, p.bias, p.eps)
    tensors = [*forward, *backward_op(p, from_output, mask).values()]
    return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors]


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("mask", [(True, False, False), (False, True, True), (True, True, True)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("kind", BOTH)
def test_fake_tensors_have_the_real_ones_metadata(
    kind: str, dtypes: Dtypes, mask: tuple[bool, ...], from_output: bool
) -> None:
    p = norm(kind, SHAPE, dtypes)
    p.x, p.grad = p.x.transpose(0, 1), p.grad.transpose(0, 1)
    real = metadata(p, from_output, list(mask))
    with FakeTensorMode() as mode:
        for name in ("x", "weight", "bias", "grad"):
            tensor = getattr(p, name)
            setattr(p, name, None if tensor is None else mode.from_tensor(tensor))
        assert metadata(p, from_output, list(mask)) == real


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(kind: str) -> None:
    p = norm(kind, SHAPE)
    for name, tensor in p.inputs.items():
        setattr(p, name, tensor.to("meta"))
    p.require("x", "weight")
    p.call().sum().backward()
    assert p.x.grad.shape == p.x.shape


@pytest.mark.parametrize("names", [("x",), ("x", "weight", "bias")], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("kind", BOTH)
def test_compiled_whole(kind: str, backend: str, names: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    p = norm(kind, SHAPE).require(*names)
    matrix = torch.randn(9, 6)
    leaves = [tensor for name, tensor in p.inputs.items() if name in names]

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(p.apply(**{**p.inputs, "x": x}) @ matrix).sum()

    expected = run(p.x)
    expected_grads = torch.autograd.grad(expected, leaves)
    got = torch.compile(run, fullgraph=True, backend=backend)(p.x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), expected_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", BOTH)
def test_compiled_for_any_number_of_rows(kind: str) -> None:
    torch._dynamo.reset()
    p = norm(kind)
    frames = CompileCounterWithBackend("aot_eager")

    def run(x: torch.Tensor) -> torch.Tensor:
        return p.apply(**{**p.inputs, "x": x})

    compiled = torch.compile(run, fullgraph=True, backend=frames, dynamic=True)
    counts = []
    for rows in (5, 12, 33):
        x = torch.randn(rows, 33)
        torch.testing.assert_close(compiled(x), run(x))
        counts.append(frames.frame_count)
    assert len(set(counts)) == 1, "another number of rows must not compile anew"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", BOTH)
def test_function_transforms_are_right_or_refused(kind: str) -> None:
    p = norm(kind)
    expected = results(p, p.apply)["x"]
    try:
        got = torch.func.vjp(lambda x: p.apply(**{**p.inputs, "x": x}), p.x)[1](p.grad)[0]
    except RuntimeError:
        pass
    else:
        torch.testing.assert_close(got, expected)
