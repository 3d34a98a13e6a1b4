"""FLOP counts of the ops for `torch.utils.flop_counter`, which otherwise cannot count them.

Importing this module registers the formulas; `safe_kernels` imports it. A multiplication and an addition are two FLOPs.
As everywhere in that counter, matrix products count, and element-wise operations (dropout, scaling, adding the base) do
not. With N rows::

    lora            h = x A'                 2 N r d_in
                    base + h B'              2 N r d_out
    lora_backward   dh = dy B                2 N r d_out    if grad_x or grad_A is wanted
                    dx = dh A                2 N r d_in     if grad_x is wanted
                    dA = dh' x               2 N r d_in     if grad_A is wanted
                    dB = dy' h               2 N r d_out    if grad_B is wanted,
                    with h = x A' once more  2 N r d_in     since h is not retained
    lora_linear     as `lora`, and x W'  2 N d_in d_out
    lora_linear_backward   as `lora_backward`, and 2 N d_in d_out for each of grad_x and grad_weight that is wanted
    lora_conv       with M taps of the kernel: 2 N M d_in d_out / groups, 2 N M r d_in, and 2 N r d_out / groups
    lora_conv_backward   as `lora_backward` with these products, and 2 N M d_in d_out / groups if grad_x is wanted
    dora            as `lora`, 2 N d_in d_out (4 with dropout), and 2 r d_in d_out for the norm
    dora_backward   as `lora_backward` (grad_magnitude wants what grad_B does), and 2 N d_in d_out for grad_magnitude
                    and for grad_x (4 with dropout)
    linear_cross_entropy             2 N d classes, ignored rows included
    linear_cross_entropy_backward    twice that: the losses, and the gradient of x
    bottleneck      z = x W_down'            2 N r d_in
                    residual + h W_up'       2 N r d_out
    bottleneck_backward   z                  2 N r d_in     if z is not retained, and more than grad_b_up is wanted
                    dh = dy W_up             2 N r d_out    if grad_x, grad_W_down or grad_b_down is wanted
                    dx, dW_down, dW_up       2 N r d        each that is wanted
    statistics      see `statistics_flop`; nothing if they are not requested

Example:
    >>> import torch, safe_kernels
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> x, base, A, B = torch.ones(10, 6), torch.ones(10, 5), torch.ones(4, 6), torch.ones(5, 4)
    >>> with FlopCounterMode(display=False) as counter:
    ...     out = safe_kernels.lora(x, base, A, B, 1.0)
    >>> counter.get_total_flops() == 2 * 10 * 4 * (6 + 5)
    True
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    "bottleneck_backward_flop",
    "bottleneck_flop",
    "dora_backward_flop",
    "dora_flop",
    "linear_cross_entropy_backward_flop",
    "linear_cross_entropy_flop",
    "lora_backward_flop",
    "lora_conv_backward_flop",
    "lora_conv_flop",
    "lora_flop",
    "lora_linear_backward_flop",
    "lora_linear_flop",
    "statistics_flop",
]

Shape = Sequence[int]
Formula = TypeVar("Formula", bound=Callable[..., int])


def _of_op(formula: Formula) -> Formula:
    """Register a formula for the op of its name. It takes the arguments of the op that it reads, by name."""
    op = getattr(torch.ops.safe_kernels, formula.__name__.removesuffix("_flop"))
    names = [argument.name for argument in op.default._schema.arguments]
    read = inspect.signature(formula).parameters

    @register_flop_formula(op)
    def count(*args: Any, **kwargs: Any) -> int:
        given = dict(zip(names, args, strict=False)) | kwargs
        return formula(**{name: value for name, value in given.items() if name in read})

    return formula


@_of_op
def lora_flop(x: Shape, lora_A: Shape, lora_B: Shape, block_starts: Shape | None = None, block_rows: int = 0) -> int:
    """FLOPs of `lora` from its arguments' shapes."""
    rows, (rank, d_in), d_out = math.prod(x[:-1]), lora_A, lora_B[0]
    flops = 2 * rows * rank * (d_in + d_out)
    if block_starts is None:
        return flops
    return flops + block_starts[0] * statistics_flop(min(block_rows, rows), d_out, rank)


@_of_op
def lora_backward_flop(grad: Shape, lora_A: Shape, lora_B: Shape, output_mask: Sequence[bool]) -> int:
    """FLOPs of `lora_backward` from its arguments' shapes."""
    rows, (rank, d_in), d_out = math.prod(grad[:-1]), lora_A, lora_B[0]
    wants_x, wants_A, wants_B = output_mask
    inner = (wants_x + wants_A + wants_B) * d_in
    outer = ((wants_x or wants_A) + wants_B) * d_out
    return 2 * rows * rank * (inner + outer)


@_of_op
def lora_linear_flop(
    x: Shape,
    weight: Shape,
    lora_A: Shape,
    lora_B: Shape,
    block_starts: Shape | None = None,
    block_rows: int = 0,
) -> int:
    """FLOPs of `lora_linear` from its arguments' shapes."""
    return 2 * math.prod(x) * weight[0] + lora_flop(x, lora_A, lora_B, block_starts, block_rows)


@_of_op
def lora_linear_backward_flop(
    grad: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, output_mask: Sequence[bool]
) -> int:
    """FLOPs of `lora_linear_backward` from its arguments' shapes."""
    wants_x, wants_weight, _, wants_A, wants_B = output_mask
    adapter = lora_backward_flop(grad, lora_A, lora_B, (wants_x, wants_A, wants_B))
    return 2 * (wants_x + wants_weight) * math.prod(grad) * weight[1] + adapter


@_of_op
def lora_conv_flop(weight: Shape, lora_A: Shape, lora_B: Shape, out_shape: Shape) -> int:
    """FLOPs of `lora_conv` from the shapes of its arguments and its result."""
    positions = math.prod(out_shape) // max(1, weight[0])
    return 2 * positions * sum(map(math.prod, (weight, lora_A, lora_B)))


@_of_op
def lora_conv_backward_flop(
    grad: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, output_mask: Sequence[bool]
) -> int:
    """FLOPs of `lora_conv_backward` from its arguments' shapes."""
    wants_x, wants_A, wants_B = output_mask
    inner = (wants_x + wants_A + wants_B) * math.prod(lora_A)
    outer = ((wants_x or wants_A) + wants_B) * math.prod(lora_B)
    return 2 * (math.prod(grad) // max(1, weight[0])) * (inner + outer + wants_x * math.prod(weight))


@_of_op
def dora_flop(x: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, dropout_p: float = 0.0) -> int:
    """FLOPs of `dora` from its arguments' shapes."""
    products = 2 if dropout_p > 0.0 else 1
    return 2 * (products * math.prod(x) + math.prod(lora_A)) * weight[0] + lora_flop(x, lora_A, lora_B)


@_of_op
def dora_backward_flop(
    grad: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, dropout_p: float, output_mask: Sequence[bool]
) -> int:
    """FLOPs of `dora_backward` from its arguments' shapes."""
    wants_x, wants_A, wants_B, wants_magnitude = output_mask
    adapter = lora_backward_flop(grad, lora_A, lora_B, (wants_x, wants_A, wants_B or wants_magnitude))
    products = wants_magnitude + wants_x * (2 if dropout_p > 0.0 else 1)
    return 2 * products * math.prod(grad) * weight[1] + adapter


@_of_op
def linear_cross_entropy_flop(x: Shape, weight: Shape) -> int:
    """FLOPs of `linear_cross_entropy` from its arguments' shapes."""
    return 2 * math.prod(x) * weight[0]


@_of_op
def linear_cross_entropy_backward_flop(x: Shape, weight: Shape) -> int:
    """FLOPs of `linear_cross_entropy_backward` from its arguments' shapes."""
    return 2 * linear_cross_entropy_flop(x, weight)


@_of_op
def bottleneck_flop(
    x: Shape, W_down: Shape, W_up: Shape, block_starts: Shape | None = None, block_rows: int = 0
) -> int:
    """FLOPs of `bottleneck` from its arguments' shapes."""
    return lora_flop(x, W_down, W_up, block_starts, block_rows)


@_of_op
def bottleneck_backward_flop(
    grad: Shape, z: Shape | None, W_down: Shape, W_up: Shape, output_mask: Sequence[bool]
) -> int:
    """FLOPs of `bottleneck_backward` from its arguments' shapes."""
    rows, (rank, d_in), d_out = math.prod(grad[:-1]), W_down, W_up[0]
    wants_x, wants_W_down, wants_b_down, wants_W_up, _ = output_mask
    slope = wants_x or wants_W_down or wants_b_down
    inner = (wants_x + wants_W_down + (z is None and (slope or wants_W_up))) * d_in
    return 2 * rows * rank * (inner + (slope + wants_W_up) * d_out)


def statistics_flop(rows: int, d_out: int, rank: int) -> int:
    """FLOPs that score one block of `rows` rows.

    The block's features X and h = scaling x A' are centred. K = X X', V = X B + h (B' B) / 2 and E = V h' + h V' are
    computed. K and E are symmetric, so only one triangle counts. Shapes do not show padding rows or the end of the last
    block, so every block counts in full.

    Example:
        >>> from safe_kernels.flops import statistics_flop
        >>> statistics_flop(rows=128, d_out=384, rank=8)
        7456768
    """
    triangle = rows * (rows + 1)
    v = 2 * rank * d_out * (rows + rank) + 2 * rows * rank * rank
    return triangle * d_out + v + triangle * 2 * rank
