"""Gathers, during a step's forwards, the sums that score adapters. Costs nothing while no scoring is due."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels import AdapterStatistics, RowBlocks

from .adapters import Adapter
from .errors import BindingError
from .parallel.refusals import REPLICA
from .watch import watch


class Observation:
    """The rows to look at, and one flat buffer of sums for all adapters.

    Args:
        model: the model whose forwards are observed; its `attention_mask` says which rows are padding.
        adapters: whom to score.
        blocks: row blocks a batch.
        block_rows: rows in a block.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter], blocks: int, block_rows: int) -> None:
        self._adapters = adapters
        self._spread = partial(RowBlocks.spread, blocks=blocks, block_rows=block_rows)
        self._armed: list[int] = []
        self._suspended = 0
        self._shift = 0
        self._sums: dict[torch.device, Tensor] = {}
        self._mask: Tensor | None = None
        self._row_blocks: dict[tuple[int, torch.device, bool], RowBlocks] = {}
        self._hooks = watch(model, self._begin_forward)

    def arm(self, live: Sequence[int], shift: int) -> None:
        """Observe the coming forwards.

        Args:
            live: indices of the adapters to score.
            shift: moves the row blocks, so that successive scorings see other rows.
        """
        self._armed, self._shift = list(live), shift
        self._sums.clear()
        self._row_blocks.clear()
        self._mask = None
        for index in live:
            adapter = self._adapters[index]
            if adapter.state is not None:
                adapter.state.observe[adapter.key] = partial(self._statistics, index)

    def finish(self) -> Tensor:
        """Stop observing.

        Returns:
            float64 [adapters, 4] on the adapters' device: the sums, over all micro-batches of this process.
        """
        device = next(iter(self._sums), None) or self.device
        total = self._buffer(device).clone()
        for other, sums in self._sums.items():
            if other != device:
                total += sums.to(device)
        self.disarm()
        return total

    @property
    def device(self) -> torch.device:
        """Where the adapters are."""
        return self._adapters[0].parameters()[0].device

    def disarm(self) -> None:
        """Stop observing and forget what was seen."""
        for index in self._armed:
            adapter = self._adapters[index]
            if adapter.state is not None:
                adapter.state.observe.pop(adapter.key, None)
        self._armed = []
        self._sums.clear()
        self._row_blocks.clear()
        self._mask = None

    def close(self) -> None:
        """Disarm, and take the hooks off the model."""
        self.disarm()
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Look away while the block runs."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    def sums(self) -> tuple[tuple[float, ...], ...]:
        """Return what was gathered so far in this step, for a state dict; empty when nothing was."""
        if not self._sums:
            return ()
        total = torch.stack([sums.cpu() for sums in self._sums.values()]).sum(0)
        return tuple(tuple(row) for row in total.tolist())

    def load_sums(self, sums: Sequence[Sequence[float]]) -> None:
        """Go on from what `sums` returned."""
        if sums:
            self._buffer(self.device).copy_(torch.tensor(sums, dtype=torch.float64))

    def _buffer(self, device: torch.device) -> Tensor:
        if device not in self._sums:
            self._sums[device] = torch.zeros(len(self._adapters), 4, dtype=torch.float64, device=device)
        return self._sums[device]

    def _begin_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A new batch: its rows and its padding are others."""
        if getattr(module, "_is_replica", False):
            raise BindingError(f"{REPLICA}.")
        if torch.compiler.is_compiling() or not self._armed:
            return
        self._row_blocks.clear()
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1:
            names = list(inspect.signature(module.forward).parameters)[: len(args)]
            mask = args[names.index("attention_mask")] if "attention_mask" in names else None
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _statistics(self, index: int, x: Tensor) -> AdapterStatistics | None:
        """Where one adapter's coming call is to add its sums."""
        if self._suspended or x.numel() == 0 or torch.is_inference_mode_enabled():
            return None
        rows = x.numel() // x.shape[-1]
        fits = self._mask is not None and self._mask.numel() == rows and x.shape[:-1] in (self._mask.shape, (rows,))
        key = (rows, x.device, fits)
        if key not in self._row_blocks:
            weight = self._mask.reshape(-1).to(x.device) != 0 if fits and self._mask is not None else None
            self._row_blocks[key] = self._spread(rows, row_weight=weight, shift=self._shift, device=x.device)
        return AdapterStatistics(self._buffer(x.device)[index], self._row_blocks[key])
