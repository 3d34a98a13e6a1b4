"""The random state of dropout."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_rng_state(device: torch.device) -> Tensor:
    """Draw a Philox seed and offset from torch's generator of `device`: int64 [2], 16 bytes.

    The state comes from torch's own generator. So `torch.manual_seed`, activation checkpointing and a resumed run give
    the same dropout.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def state_of_call(x: Tensor | None, dropout_p: float, rng_state: Tensor | None) -> Tensor | None:
    """Return the caller's random state, or a new one if the call drops. The op itself checks the types of arguments."""
    drops = not isinstance(dropout_p, int | float) or dropout_p > 0.0
    return draw_rng_state(x.device) if rng_state is None and drops and isinstance(x, Tensor) else rng_state
