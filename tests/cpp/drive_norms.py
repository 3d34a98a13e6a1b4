"""Drives the norms through many shapes, dtypes, strides and threads."""

from __future__ import annotations

import itertools

import torch
from driving import DTYPES, ROWS, WIDTHS, close, count, exactly, run, views, with_one_and_two_threads
from torch import Tensor

import safe_kernels
from safe_kernels import reference

ops = torch.ops.safe_kernels


def compare(names: tuple[str, ...], got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for name, a, b in zip(names, got, expected, strict=True):
        close(a, b, f"{name}: {what}")


def rms_norm(x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """One forward, and one backward from input and output for every output mask."""
    what = f"rms_norm {list(x.shape)} {x.dtype}/{weight.dtype}"
    out, rstd = ops.rms_norm(x, weight, 1e-3, 0.5)
    compare(("out", "rstd"), (out, rstd), reference.rms_norm(x, weight, 1e-3, 0.5), what)
    for from_output, *mask in itertools.product([True, False], repeat=3):
        arguments = (grad, out if from_output else x, weight, rstd, 0.5, from_output, mask)
        got, expected = ops.rms_norm_backward(*arguments), reference.rms_norm_backward(*arguments)
        compare(("grad_x", "grad_weight"), got, expected, what)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, grad: Tensor) -> None:
    """The same."""
    what = f"layer_norm {list(x.shape)} {x.dtype} weight {weight is not None} bias {bias is not None}"
    out, mean, rstd = ops.layer_norm(x, weight, bias, 1e-3)
    compare(("out", "mean", "rstd"), (out, mean, rstd), reference.layer_norm(x, weight, bias, 1e-3), what)
    for from_output, *mask in itertools.product([True, False], repeat=4):
        mask = [mask[0], mask[1] and weight is not None, mask[2] and bias is not None]
        retained, given = (out, None) if from_output else (x, mean)
        arguments = (grad, retained, weight, bias, given, rstd, from_output, mask)
        got, expected = ops.layer_norm_backward(*arguments), reference.layer_norm_backward(*arguments)
        compare(("grad_x", "grad_weight", "grad_bias"), got, expected, what)


def problem(rows: int, d: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, ...]:
    """x, weight, bias, grad."""
    x, grad = (exactly(torch.randn(rows, d).to(dtypes[0])) for _ in range(2))
    return x, exactly((0.5 + torch.rand(d)).to(dtypes[1])), exactly(torch.rand(d).to(dtypes[1])), grad


def once(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, turn: int = 0) -> None:
    rms_norm(x, weight, grad)
    layer_norm(x, (weight, None)[turn % 2], (bias, None)[turn // 2 % 2], grad)


def many_shapes() -> None:
    for i in range(count(440)):
        once(*problem(ROWS[i % len(ROWS)], WIDTHS[i % len(WIDTHS)], DTYPES[i % len(DTYPES)]), turn=i)


def many_strides() -> None:
    for dtypes in DTYPES:
        x, weight, bias, grad = problem(37, 21, dtypes)
        for view in views(x):
            once(view, weight, bias, grad)
        for view in views(grad):
            once(x, weight, bias, view)
        once(x[:1].expand(37, -1), weight[:1].expand(21), bias, grad[:, :1].expand(-1, 21))


def many_threads() -> None:
    problems = [problem(200 + i, 48, DTYPES[i % len(DTYPES)]) for i in range(8)]
    with_one_and_two_threads(lambda i: once(*problems[i % 8]))


def through_autograd() -> None:
    """What is saved and freed on the way through the graph."""
    for flags in itertools.product([True, False], repeat=3):
        tensors = problem(33, 17, DTYPES[0])[:3]
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        for out in (safe_kernels.layer_norm(*tensors, 1e-5), safe_kernels.rms_norm(*tensors[:2], 1e-5)):
            if out.requires_grad:
                out.sum().backward(retain_graph=True)
                out.sum().backward()


if __name__ == "__main__":
    run(many_shapes, many_strides, through_autograd, many_threads)
