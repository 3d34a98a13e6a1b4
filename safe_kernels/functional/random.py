"""Where dropout's random state comes from."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_rng_state(device: torch.device) -> Tensor:
    """Draws a Philox seed and offset from torch's generator of `device`: int64 [2], 16 bytes.

    Since they come from torch's own generator, `torch.manual_seed`, activation checkpointing and a resumed run give the
    same dropout.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
