"""Drives every op, backward ones included, through arguments that are wrong, odd, huge, empty or far from finite."""

from __future__ import annotations

import itertools
import warnings
from random import Random

import torch
from driving import count, exactly, run
from mutations import OPS, check, mutated

import safe_kernels
from safe_kernels import AdapterStatistics, RowBlocks

FAR = 2**63 - 1


def arguments_that_are_wrong_or_odd() -> None:
    for op in OPS:
        answered = sum(check(op, *mutated(op, Random(seed))) for seed in range(count(440)))
        assert answered, f"{op} took nothing at all"


def blocks_of_rows_anywhere() -> None:
    """Out of range, overlapping, far longer than the rows; refused, or scored within the rows."""
    x, base, A, B = (exactly(torch.randn(size)) for size in ((9, 5), (9, 6), (3, 5), (6, 3)))
    starts = [-FAR - 1, -1, 0, 4, 8, 9, FAR]
    for first, second, block_rows in itertools.product(starts, starts, [1, 2, 9, 10, 8192, FAR]):
        blocks = RowBlocks(exactly(torch.tensor([first, second])), block_rows, exactly(torch.arange(9) % 2 == 0))
        statistics = AdapterStatistics(blocks=blocks)
        inside = 0 <= first < 9 and 0 <= second < 9
        try:
            safe_kernels.lora(x, base, A, B, 2.0, statistics=statistics)
        except ValueError:
            assert not inside or block_rows == FAR, f"refused {first}, {second} x {block_rows}"
        else:
            assert inside and statistics.rows <= 18, f"took {first}, {second} x {block_rows}"


def numbers_far_from_finite() -> None:
    """Through every op and its gradient; what they give is the tests' business."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, 0.0, -0.0, 1.0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x, base = (exactly(special.repeat(9, 1).to(dtype)).requires_grad_() for _ in range(2))
        A, B = (exactly(special[: 9 * 2].repeat(2, 1).to(dtype)).requires_grad_() for _ in range(2))
        outs = [
            safe_kernels.lora(
                x, base, A, B.t(), 2.0, dropout_p=0.5, statistics=AdapterStatistics(blocks=RowBlocks.spread(9))
            ),
            safe_kernels.lora_linear(x, x, None, A, B.t(), 2.0),
            safe_kernels.dora(x, x.detach(), None, A, B.t(), x[:, 0].detach(), 2.0, dropout_p=0.5),
            *(
                safe_kernels.bottleneck(x, base, A, A[:, 0], B.t(), x[:, 0], kind, 2.0, dropout_p=0.5)
                for kind in ("silu", "relu")
            ),
            safe_kernels.rms_norm(x, x[0], 0.0),
            safe_kernels.layer_norm(x, x[0], x[1], 0.0),
            safe_kernels.dropout(x, 0.5),
            safe_kernels.linear_cross_entropy(x, x.detach(), None, torch.arange(9))[:, None].expand(9, 9),
            *(safe_kernels.activation(x, kind) for kind in ("silu", "gelu", "gelu_tanh", "relu")),
            *(safe_kernels.gated_activation(x, base, kind) for kind in ("silu", "gelu", "gelu_tanh", "relu")),
        ]
        for out in outs:
            out.backward(base.detach())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    run(arguments_that_are_wrong_or_odd, blocks_of_rows_anywhere, numbers_far_from_finite)
