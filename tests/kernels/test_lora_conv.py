"""`lora_conv`: values, gradients, what is retained, and what is refused."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from convs import D_OUT, NAMES, RANK, SQUARE, WINDOWS, Conv, Window, conv
from linears import assert_results, results, retained_by
from oracle import DTYPES, Dtypes
from torch.autograd import gradcheck

import safe_kernels
from safe_kernels.retention import measure

SUBSETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(len(NAMES) + 1)))
each_window = pytest.mark.parametrize("window", WINDOWS, ids=str)


def check(p: Conv) -> None:
    assert_results(p, results(p, p.apply))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(dtypes: Dtypes, dropout_p: float) -> None:
    p = conv(SQUARE, dtypes, dropout_p=dropout_p)
    if dropout_p == 1.0:
        torch.testing.assert_close(p.call(), torch.conv2d(p.x, p.weight, p.bias, *SQUARE.steps))
    else:
        check(p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@each_window
def test_windows(window: Window, dropout_p: float) -> None:
    check(conv(window, dropout_p=dropout_p))
    check(conv(window, dropout_p=dropout_p, has_bias=False))


@pytest.mark.parametrize("batch", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("window", [WINDOWS[0], WINDOWS[4], WINDOWS[5]], ids=str)
def test_batches(window: Window, batch: tuple[int, ...]) -> None:
    check(conv(window, batch=batch, dropout_p=0.1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_any_strides(dropout_p: float) -> None:
    p = conv(Window((6, 6), (3, 3), padding=(1, 1)), dropout_p=dropout_p)
    p.x, p.grad = p.x.mT.contiguous().mT, p.grad.mT.contiguous().mT
    p.weight, p.A, p.B = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (p.weight, p.A, p.B))
    check(p)


@pytest.mark.parametrize("names", [("x", "A", "B"), ("x",)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_channels_last_stays(dropout_p: float, names: tuple[str, ...]) -> None:
    """As in PyTorch's convolution, the output and the gradient of x have the memory format of x."""
    p = conv(dropout_p=dropout_p)
    p.x, p.grad = (t.to(memory_format=torch.channels_last) for t in (p.x, p.grad))
    check(p)
    p.require(*names)
    out = p.call()
    out.backward(p.grad)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (out, p.x.grad))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_every_subset_of_requires_grad_and_what_it_retains(names: tuple[str, ...], dropout_p: float) -> None:
    p = conv(WINDOWS[4], DTYPES[4], dropout_p=dropout_p)
    retained = retained_by(p, names, assert_results, (p.weight, p.bias, p.A, p.B))
    given = set(names)
    only_B = "B" in given and "A" not in given
    drops = given & ({"x", "A"} if only_B else {"x", "A", "B"}) if dropout_p else ()
    hidden = p.grad.numel() // D_OUT * RANK * p.A.element_size()
    kept = hidden if only_B else p.x.nbytes if "A" in given else 0
    assert retained == kept + (16 if drops else 0)


def test_all_readers_of_an_input_retain_it_once() -> None:
    p, other = conv().require("A", "B"), conv(has_bias=False).require("A", "B")
    retained = measure(lambda: p.call() + other.apply(p.x, other.A, other.B), exclude=(p.weight, other.weight))
    assert retained.bytes == p.x.nbytes + sum(t.nbytes for t in (p.A, p.B, other.A, other.B))


def test_behind_an_activation_it_retains_what_that_does() -> None:
    p = conv(dropout_p=0.1).require("A", "B")
    gate = p.x.detach().requires_grad_()
    leaves = (gate, p.A, p.B)
    retained = measure(
        lambda: p.apply(safe_kernels.activation(gate, "silu"), p.A, p.B), exclude=(p.weight, p.bias, p.A, p.B)
    )
    assert retained.bytes == gate.nbytes + 16
    got = torch.autograd.grad(retained.output, leaves, p.grad)
    out = p.apply(safe_kernels.activation(gate, "silu") + 0.0, p.A, p.B)
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(out, leaves, p.grad), strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("window", [Window((3, 4), (2, 2), stride=(2, 1), groups=2), Window((4,), (1,))], ids=str)
def test_gradcheck(window: Window, dropout_p: float) -> None:
    p = conv(window, DTYPES[1], batch=(2,), dropout_p=dropout_p).require(*NAMES)
    assert gradcheck(lambda x, bias, A, B: p.apply(x, A, B, bias), (p.x, p.bias, p.A, p.B))


@pytest.mark.parametrize("names", [(), ("A", "B"), ("x", "B"), NAMES], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck(names: tuple[str, ...], memory_format: torch.memory_format) -> None:
    p = conv(WINDOWS[4], dropout_p=0.2)
    p.x = p.x.to(memory_format=memory_format)
    p.require(*names)
    steps = (*map(list, p.window.steps), p.window.groups)
    arguments = (p.x, p.weight, p.bias, p.A, p.B, 2.0, *steps, 0.2, p.rng_state)
    torch.library.opcheck(torch.ops.safe_kernels.lora_conv.default, arguments)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=str)
@pytest.mark.parametrize("mask", [(True,) * 3, (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("batch", [(3,), ()], ids=str)
def test_opcheck_backward(mask: tuple[bool, ...], dtypes: Dtypes, batch: tuple[int, ...]) -> None:
    p = conv(SQUARE, dtypes, batch=batch)
    x = p.x if any(mask[1:]) else None
    steps = (list(p.x.shape), *map(list, SQUARE.steps), 1)
    arguments = (p.grad, x, p.weight, p.A, p.B, 2.0, *steps, 0.0, None, list(mask))
    torch.library.opcheck(torch.ops.safe_kernels.lora_conv_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    p = conv(dropout_p=0.2).require("x", "A", "B")

    def run(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.relu(p.apply(x, A, B, p.bias)).sum()

    leaves = (p.x, p.A, p.B)
    expected = torch.autograd.grad(run(*leaves), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast_changes_nothing() -> None:
    p = conv(dropout_p=0.2)
    expected = p.call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(p.call(), expected)


def test_a_write_to_its_input_before_backward_is_an_error() -> None:
    p = conv().require("A")
    out = p.call()
    p.x.add_(1.0)
    with pytest.raises(RuntimeError, match="A bound adapter layer"):
        out.sum().backward()


def test_double_backward_is_refused() -> None:
    p = conv().require("x", "A")
    with pytest.raises(RuntimeError, match="lora_conv cannot be differentiated twice"):
        (grad,) = torch.autograd.grad(p.call().square().sum(), p.x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": torch.zeros(8, 6)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(8, 6, 3, 3, requires_grad=True)}, ValueError, "must not require grad"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \[8\]"),
        ({"x": torch.zeros(2, 5, 5, 6)}, ValueError, r"x must have shape \[\.\.\., 6\]"),
        ({"x": torch.zeros(1, 3, 6, 5, 6)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(3, 6, 5, 6).int()}, TypeError, "x must be float64"),
        ({"A": torch.zeros(4, 6, 1, 1)}, ValueError, r"lora_A must have shape \[r, 6, \*kernel\]"),
        ({"B": torch.zeros(8, 4, 3, 3)}, ValueError, r"lora_B must have shape \[8, r / groups\]"),
        ({"B": torch.zeros(8, 4, 1, 1).double()}, TypeError, "must have one dtype"),
        ({"window": Window((5, 6), (3, 3), stride=(1,))}, ValueError, "stride must have 2 numbers"),
        ({"window": Window((5, 6), (3, 3), stride=(1, 0))}, ValueError, "stride must be at least 1"),
        ({"window": Window((5, 6), (3, 3), padding=(-1, 0))}, ValueError, "padding must be at least 0"),
        ({"window": Window((5, 6), (3, 3), groups=3)}, ValueError, "groups must divide d_out"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, object], error: type[Exception], words: str) -> None:
    p = conv()
    for name, value in changes.items():
        setattr(p, name, value)
    with pytest.raises(error, match=words):
        p.call()
