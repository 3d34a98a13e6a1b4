"""What `torch.compile` has to be told while adapters are scored and frozen."""

from __future__ import annotations

import weakref
from collections.abc import Collection

import torch

_holders: set[int] = set()
_stances: list[torch._dynamo.set_stance] = []  # ours, which knows the one that was set before; at most one


class EagerForwards:
    """Has compiled models run their Python code, uncompiled, while a scoring step looks at their forwards.

    A graph that scores is another graph than one that does not: every freezing would compile two. Scorings are rare,
    so they do without. The stance that was set before is set again when this is not needed any longer: at `end`, or
    when a training that was broken off in a scoring step is forgotten.
    """

    def __init__(self) -> None:
        weakref.finalize(self, _release, id(self))

    def begin(self) -> None:
        """Run uncompiled from now on. Doing it twice does no harm."""
        stance = torch.compiler.set_stance("force_eager")
        if not _holders or stance.prev.stance != "force_eager":
            _stances[:] = [stance]
        _holders.add(id(self))

    def end(self) -> None:
        """Run as before. Doing it twice does no harm."""
        _release(id(self))


def _release(holder: int) -> None:
    _holders.discard(holder)
    if not _holders and _stances:
        _stances.pop().__exit__(None, None, None)


def allow_recompilations(frozen: Collection[str], blocks: Collection[str]) -> None:
    """Raise torch's limit on recompilations by what a freeze event may need; at the limit torch stops compiling.

    A model compiled whole compiles once more, in training and once in evaluation. Of blocks compiled one by one those
    do in which something froze, and the one above if no gradient reaches it any longer; all share one limit.

    Args:
        frozen: names of the adapters that froze.
        blocks: names of the transformer blocks.
    """
    touched = [block for block in blocks if any(name.startswith(f"{block}.") for name in frozen)]
    room = 2 * (1 + 2 * len(touched))
    torch._dynamo.config.recompile_limit += room
    torch._dynamo.config.accumulated_recompile_limit += room
