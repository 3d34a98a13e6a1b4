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


def state_of_call(x: Tensor, dropout_p: float, rng_state: Tensor | None) -> Tensor | None:
    """The caller's random state, or a new one if the call drops; arguments of a wrong type are left to the op to name.

    Args:
        x: what is dropped out.
        dropout_p: probability that an element is dropped.
        rng_state: int64 [2], or None.
    """
    drops = not isinstance(dropout_p, int | float) or dropout_p > 0.0
    return draw_rng_state(x.device) if rng_state is None and drops and isinstance(x, Tensor) else rng_state
