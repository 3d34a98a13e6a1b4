"""One forward of a stack whose lowest blocks are frozen: which samples are known, and which still have to run."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

OFF = "set prefix_cache=None"
KEEPS = "the model keeps what its blocks return"


@dataclass(eq=False)
class Plan:
    """One forward of a stack.

    Args:
        cut: the index of the first block that always runs.
        name: the name of that block.
        keys: of the samples; none if this forward does not use the cache.
        kept: per sample, the indices of its tokens; None means all.
        padding: [samples, tokens], True where there is padding that has no effect; None without padding.
        known: by sample, the block whose input is known, and this input.
        random: the state of the generators before the first block.
        probes: whether backward shows if padding has an effect.
        checked: a sample that is computed although it is known.
    """

    cut: int
    name: str
    keys: Sequence[str] = ()
    kept: Sequence[Tensor | None] = ()
    padding: Tensor | None = None
    known: Mapping[int, tuple[int, Tensor]] = field(default_factory=dict)
    random: Sequence[Tensor] = ()
    probes: bool = False
    checked: int | None = None
    reason: str = ""
    outputs: list[weakref.ref[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = dict(self.known)
        self.active = [row for row in range(len(self.keys)) if row not in self.known]

    @property
    def filled(self) -> bool:
        """Whether the padding of a sample was filled with zeros."""
        return any(self.kept[row] is not None for row in self.known)

    def require_exact(self) -> None:
        """Raise if the samples that were skipped are not what they would be without the cache.

        Raises:
            RuntimeError: They are not.
        """
        if self.reason and self.known:
            raise RuntimeError(f"prefix_cache: {self.reason}, after blocks were skipped; {OFF}.")

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Put in the samples that are known up to a block."""
        arrived = {row: value for row, (depth, value) in self.waiting.items() if depth <= index}
        if not arrived:
            return hidden
        dtype = next(iter(arrived.values())).dtype
        full = torch.zeros_like(hidden, dtype=dtype)
        if self.active:
            rows = torch.tensor(self.active, device=hidden.device)
            full[rows] = hidden[rows].to(dtype)
        for row, value in arrived.items():
            places = self.kept[row]
            full[row, slice(None) if places is None else places.to(hidden.device)] = value.to(hidden.device)
            del self.waiting[row]
        self.active = sorted([*self.active, *arrived])
        return full


def generators() -> list[Tensor]:
    """Return the states of the generators of random numbers, which show whether a forward drew some."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
