"""One forward of a stack whose lowest blocks are frozen: which samples are known, and which still have to run."""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .store import Known

OFF = "set prefix_cache=None"


class Batch(NamedTuple):
    """A batch: its tokens per sample, with padding, and a hash of its samples' keys."""

    tokens: int | None
    samples: int | None


@dataclass(eq=False)
class Plan:
    """One forward of a stack.

    Args:
        cut: the index of the first block that always runs.
        name: the name of that block.
        keys: of the samples.
        batch: the identity of this batch.
        kept: per sample, the indices of its tokens; None means all.
        padding: [samples, tokens], True where there is padding that has no effect; None without padding.
        known: by sample, the block whose input is known, and this input.
        checked: samples that are computed although they are known: the depth and the value that are kept.
        tried: samples that run twice for a comparison: in the whole batch, and in a part of it.
        drawn: the state of the generators before the first block.

    Attributes:
        probes: whether backward shows if padding has an effect.
        given: the arguments of the first block.
        reason: why this forward differs from one without the cache, or cannot be kept.
        outputs: the outputs of the blocks so far.
        version: the last output's version, which a write in place changes.
    """

    cut: int
    name: str
    keys: Sequence[str]
    batch: Batch
    kept: Sequence[Tensor | None]
    padding: Tensor | None
    known: Mapping[int, Known]
    checked: Mapping[int, Known]
    tried: Sequence[int]
    drawn: Sequence[bytes]

    def __post_init__(self) -> None:
        self.probes, self.reason = False, ""
        self.given: Sequence[Tensor] = ()
        self.outputs: list[weakref.ref[Tensor]] = []
        self.version = -1
        self.waiting = dict(self.known)
        self.active = [row for row in range(len(self.keys)) if row not in self.known]

    @property
    def filled(self) -> bool:
        """Whether the padding of a known sample is filled instead of computed by the blocks."""
        return any(self.kept[row] is not None for row in self.known)

    @property
    def last(self) -> Tensor | None:
        """The output of the last block, if nothing was written to it."""
        last = self.outputs[-1]() if self.outputs else None
        return last if last is not None and last._version == self.version else None

    def returned(self, output: Tensor) -> None:
        """Record a block's output."""
        self.outputs.append(weakref.ref(output))
        self.version = output._version

    def require_exact(self) -> None:
        """Raise if skipped samples could differ from those of a forward without the cache."""
        if self.reason and self.known:
            raise RuntimeError(f"prefix_cache: {self.reason}, after blocks were skipped; {OFF}.")

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """Insert the samples that are known up to a block."""
        arrived = {row: value for row, (depth, value) in self.waiting.items() if depth <= index}
        if not arrived:
            return hidden
        dtype = next(iter(arrived.values())).dtype
        full = unknown(hidden, dtype)
        if self.active:
            rows = torch.tensor(self.active, device=hidden.device)
            full[rows] = hidden[rows].to(dtype)
        for row, value in arrived.items():
            places = self.kept[row]
            if places is not None:
                full[row] = value[0].to(hidden.device)  # padding; zeros could become NaN in a division by their norm
            full[row, slice(None) if places is None else places.to(hidden.device)] = value.to(hidden.device)
            del self.waiting[row]
        self.active = sorted([*self.active, *arrived])
        return full


def unknown(hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return NaN for unknown hidden states: a model that reads them gets a NaN loss, and not a wrong one."""
    return torch.full_like(hidden, torch.nan, dtype=dtype)


def generators() -> tuple[bytes, ...]:
    """Return the states of the generators of random numbers, which show whether a forward drew some."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    others = repr((random.getstate(), np.random.get_state(legacy=False)["state"]))
    return (*(state.numpy().tobytes() for state in states), others.encode())
