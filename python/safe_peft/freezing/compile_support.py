"""Settings of `torch.compile` for scoring steps and freeze events."""

from __future__ import annotations

import weakref
from collections.abc import Collection

import torch

_holders: set[int] = set()
_stances: list[torch._dynamo.set_stance] = []  # at most one; it stores the stance that was set before it


class EagerForwards:
    """Makes compiled models run eagerly during a scoring step.

    A scoring step needs a graph of its own, so every freeze event would compile two graphs. Scoring steps are rare, so
    they run eagerly. `end` restores the earlier stance; so does the garbage collector after an interrupted training.
    """

    def __init__(self) -> None:
        weakref.finalize(self, _release, id(self))

    def begin(self) -> None:
        """Run eagerly from now on. A second call does nothing."""
        stance = torch.compiler.set_stance("force_eager")
        if not _holders or stance.prev.stance != "force_eager":
            _stances[:] = [stance]
        _holders.add(id(self))

    def end(self) -> None:
        """Run as before. A second call does nothing."""
        _release(id(self))


def _release(holder: int) -> None:
    _holders.discard(holder)
    if not _holders and _stances:
        _stances.pop().__exit__(None, None, None)


def allow_recompilations(frozen: Collection[str], blocks: Collection[str]) -> None:
    """Raise torch's limit on recompilations by the number that a freeze event may need.

    At the limit torch stops compiling. A model that is compiled as a whole compiles again once in training and once in
    evaluation. If blocks are compiled separately, each block with a new frozen adapter compiles again, and the block
    above it if gradients no longer reach that one. All blocks share one limit.
    """
    room = 2 + 4 * sum(any(name.startswith(f"{block}.") for name in frozen) for block in blocks)
    torch._dynamo.config.recompile_limit += room
    torch._dynamo.config.accumulated_recompile_limit += room
