"""Tensors and sizes of the tests of retained bytes."""

from __future__ import annotations

import torch
from torch import Tensor

N, D = 6, 10


BYTES = N * D * 4


def leaf(*shape: int) -> Tensor:
    return torch.randn(*(shape or (N, D)), requires_grad=True)
