"""Norms compared with PyTorch's where tensors are written to in place, and where forwards run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from norms import Norm, norm, plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import safe_kernels

BOTH = ("rms", "layer")


class Block:
    """A norm, and what reads it: an adapter that trains, a layer that trains whole, or neither."""

    def __init__(self, kind: str, *readers: str) -> None:
        self.p: Norm = norm(kind).require("x")
        self.readers = readers
        self.A, self.B = nn.Parameter(torch.randn(4, 33)), nn.Parameter(torch.randn(33, 4))
        self.weight = nn.Parameter(torch.randn(33, 33))
        self.leaves = (self.p.x, self.A, self.B, self.weight)

    def read(self, y: Tensor) -> Tensor:
        out = y * 1.0
        for reader in self.readers:
            if reader == "whole":
                out = out + nn.functional.linear(y, self.weight)
            else:
                out = safe_kernels.lora(y, out, self.A, self.B, 2.0)
        return out

    def gradients(self, out: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(out, self.leaves, self.p.grad, allow_unused=True))


def alike(got: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        b is a if a is None or b is None else torch.allclose(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("kind", BOTH)
def test_an_output_that_nothing_else_keeps_may_be_written_to(kind: str) -> None:
    p = norm(kind).require("x")
    out = p.call()
    out[:, 5:] = 0
    (got,) = torch.autograd.grad(out, p.x, p.grad)
    masked = norm(kind)
    masked.grad[:, 5:] = 0
    expected = plain(masked)["x"]
    assert torch.allclose(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", BOTH)
def test_an_output_that_a_reader_keeps_may_not(kind: str) -> None:
    block = Block(kind, "adapter")
    y = block.p.call()
    out = block.read(y)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match=r"(?s)modified by an inplace operation.*safe_kernels.*clone"):
        torch.autograd.grad(out, block.p.x, block.p.grad)


@pytest.mark.parametrize("kind", BOTH)
def test_an_input_that_is_written_to_is_noticed(kind: str) -> None:
    block = Block(kind, "adapter")
    for is_read in (False, True):
        x = block.p.x * 1.0
        y = block.p.apply(**{**block.p.inputs, "x": x})
        x.detach().mul_(2)
        out = block.read(y) if is_read else y
        with pytest.raises(RuntimeError, match=r"(?s)modified by an inplace operation.*safe_kernels.*clone"):
            torch.autograd.grad(out, block.p.x, block.p.grad)


def through_data(y: Tensor) -> None:
    y.data.mul_(1.5)


def through_numpy(y: Tensor) -> None:
    y.detach().numpy()[:] *= 1.5


def other_data(y: Tensor) -> None:
    y.data = y.data * 1.5


@pytest.mark.parametrize("write", [through_data, through_numpy, other_data])
@pytest.mark.parametrize("kind", BOTH)
def test_a_write_that_no_version_counts(kind: str, write: Callable[[Tensor], None]) -> None:
    """As in stock PyTorch the reader sees what was written, and the norm's own gradient is that of what it computed."""
    block = Block(kind, "adapter")
    y = block.p.call()
    write(y)
    got = block.gradients(block.read(y))
    other = block.p.call(retain_output=False)
    write(other)
    assert alike(got, block.gradients(block.read(other)))


@pytest.mark.parametrize("change", [through_data, through_numpy])
@pytest.mark.parametrize(("kind", "name"), [("rms", "weight"), ("layer", "weight"), ("layer", "bias")])
def test_a_weight_that_changed_after_the_forward(kind: str, name: str, change: Callable[[Tensor], None]) -> None:
    """Backward from the output divides by the weight that made it; backward from the input is PyTorch's own."""
    block = Block(kind, "adapter")
    parameter = getattr(block.p, name)
    out = block.read(block.p.call())
    kept = parameter.clone()
    change(parameter)
    with pytest.raises(RuntimeError, match=r"(?s)bound norm.*between forward and backward.*Call backward before"):
        torch.autograd.grad(out, block.p.x, block.p.grad, retain_graph=True)
    parameter.data.copy_(kept)
    block.gradients(out)


def test_an_offset_is_added_in_forward() -> None:
    """transformers keeps the sum of weight and offset: what changes the weight later does not reach it."""
    p = norm("rms-offset").require("x")
    out = p.call()
    p.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match=r"(?s)bound norm.*between forward and backward"):
        torch.autograd.grad(out, p.x, p.grad)


@pytest.mark.parametrize(
    "readers", [(), ("adapter",), ("whole", "adapter"), ("adapter", "whole"), ("adapter", "adapter")]
)
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("kind", BOTH)
def test_a_forward_that_runs_again_saves_as_many_tensors(kind: str, early_stop: bool, readers: tuple[str, ...]) -> None:
    """Hooks make aliases of what is saved, in the second run and not in the first."""
    block = Block(kind, *readers)

    def run(x: Tensor) -> Tensor:
        return block.read(block.p.apply(**{**block.p.inputs, "x": x}))

    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        got = block.gradients(checkpoint(run, block.p.x, use_reentrant=False))
    assert alike(got, block.gradients(run(block.p.x)))


@pytest.mark.parametrize("retained", [True, False])
@pytest.mark.parametrize("kind", BOTH)
def test_a_weight_changed_before_the_reader_is_noticed_as_ever(kind: str, retained: bool) -> None:
    block = Block(kind, "adapter")
    y = block.p.call(retained)
    block.p.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(block.read(y), block.p.x, block.p.grad)


@pytest.mark.parametrize("kind", BOTH)
def test_a_reader_that_comes_after_backward(kind: str) -> None:
    block = Block(kind, "adapter")
    y = block.p.call()
    torch.autograd.grad(y, block.p.x, block.p.grad)
    out = block.read(y)
    assert torch.autograd.grad(out, block.B, block.p.grad)[0].isfinite().all()
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(block.read(y), block.p.x, block.p.grad)


@pytest.mark.parametrize("kind", BOTH)
def test_two_readers_and_two_backwards(kind: str) -> None:
    block = Block(kind, "adapter", "adapter")
    out = block.read(block.p.call())
    first = torch.autograd.grad(out, block.p.x, block.p.grad, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, block.p.x, block.p.grad)[0])
