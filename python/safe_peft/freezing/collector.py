"""Gathers the sums for scores during the forwards of a scoring step. Other steps cost nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels import AdapterStatistics, RowBlocks

from ..binding.adapters import Adapter
from ..binding.forward_hooks import Call, Watcher, attention_masks, named_arguments

Sums = dict[torch.device, Tensor]


class StatisticsCollector:
    """Selects the rows to score, and holds one flat buffer of sums for all adapters.

    Only forwards with gradients count: not generation, and not the first of the two passes of reentrant checkpointing.
    The sums of a forward count when it has ended; a forward that fails, for example out of memory, adds nothing. The
    model's attention masks mark padding rows. `begins` is called with the module at the start of each forward.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Sequence[Adapter],
        blocks: int,
        block_rows: int,
        begins: Callable[[nn.Module], None],
    ) -> None:
        self._adapters = adapters
        self._spread = partial(RowBlocks.spread, blocks=blocks, block_rows=block_rows)
        self._begins = begins
        self._armed: list[int] = []
        self._shift = 0
        self._sums: Sums = {}
        self._lock = threading.Lock()
        self._recent: list[Tensor] = []  # masks of the forwards since the latest backward; a recompute uses them
        self._in_backward = False
        self._row_blocks: dict[Any, RowBlocks] = {}
        self._watcher = Watcher(model, self._begin_forward, self._end_forward)

    def arm(self, live: Sequence[int], shift: int) -> None:
        """Observe the adapters with these indices in the next forwards; each `shift` selects other rows."""
        self._armed, self._shift = list(live), shift
        self._forget()
        for index in live:
            adapter = self._adapters[index]
            if adapter.state is not None:
                adapter.state.observe[adapter.key] = partial(self._statistics, index)

    def finish(self) -> Tensor:
        """Stop observing, and return float64 [adapters, 4]: the sums over all micro-batches of this process."""
        total = self._total(next(iter(self._sums), self.device))
        self.disarm()
        return total

    def _total(self, device: torch.device) -> Tensor:
        none = torch.zeros(len(self._adapters), 4, dtype=torch.float64, device=device)
        return sum((sums.to(device) for sums in self._sums.values()), start=none)

    @property
    def device(self) -> torch.device:
        """The device of the adapters."""
        return self._adapters[0].parameters()[0].device

    def disarm(self) -> None:
        """Stop observing and drop the sums."""
        for index in self._armed:
            adapter = self._adapters[index]
            if adapter.state is not None:
                adapter.state.observe.pop(adapter.key, None)
        self._armed = []
        self._forget()

    def close(self) -> None:
        """Disarm, and remove the hooks from the model."""
        self.disarm()
        self._watcher.close()

    def suspended(self) -> AbstractContextManager[None]:
        """Observe nothing inside the block."""
        return self._watcher.suspended()

    def sums(self) -> tuple[tuple[float, ...], ...]:
        """Return this step's sums so far, for a state dict; empty if there are none."""
        return tuple(map(tuple, self._total(torch.device("cpu")).tolist())) if self._sums else ()

    def load_sums(self, sums: Sequence[Sequence[float]]) -> None:
        """Continue from the output of `sums`."""
        if sums:
            self._buffer(self._sums, self.device).copy_(torch.tensor(sums, dtype=torch.float64))

    def _forget(self) -> None:
        self._sums = {}
        self._recent, self._in_backward = [], False
        self._row_blocks.clear()
        self._watcher.reset()

    def _buffer(self, sums: Sums, device: torch.device) -> Tensor:
        if device not in sums:
            sums[device] = torch.zeros(len(self._adapters), 4, dtype=torch.float64, device=device)
        return sums[device]

    # ---------------------------------------------------------------- forwards

    def _begin_forward(self, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begin a new batch, with its own rows and padding."""
        self._begins(call.module)
        if not self._armed:
            return
        found = list(attention_masks(named_arguments(call.module, args, kwargs)))
        if not found and call.outer is not None:
            found = call.outer.notes.get("masks", [])
        call.notes.update(masks=found, sums={}, row_blocks={})
        if call.task == -1 and torch.is_grad_enabled():
            if self._in_backward:
                self._recent, self._in_backward = [], False
            self._recent += [mask for mask in found if all(mask is not other for other in self._recent)]
            self._row_blocks.clear()

    def _end_forward(self, call: Call, output: Any, died: bool) -> None:
        """Add an inner forward's sums to the outer forward, because that one may still fail."""
        found: Sums = call.notes.get("sums", {})
        if died or not found or not self._armed:
            return
        with self._lock:
            sums = self._sums if call.outer is None else call.outer.notes.setdefault("sums", {})
            for device, gathered in found.items():
                self._buffer(sums, device).add_(gathered)

    def _statistics(self, index: int, x: Tensor) -> AdapterStatistics | None:
        """Return where to add the sums of an adapter's next call, with x [..., features]; None if it does not count."""
        if self._watcher.is_suspended or x.numel() == 0 or not torch.is_grad_enabled():
            return None
        call, task = self._watcher.current, torch._C._current_graph_task_id()
        if call is not None and call.task == task and "sums" in call.notes:
            sums, masks, known = call.notes["sums"], call.notes["masks"], call.notes["row_blocks"]
        else:  # run again in backward, or called by itself
            sums, masks, known = self._sums, self._recent, self._row_blocks
        self._in_backward |= task != -1
        return AdapterStatistics(self._buffer(sums, x.device)[index], self._rows(x, masks, known))

    def _rows(self, x: Tensor, masks: Sequence[Tensor], known: dict[Any, RowBlocks]) -> RowBlocks:
        """Return the rows to score: those that no mask of the same shape marks as padding."""
        rows = x.numel() // x.shape[-1]
        fit = [m for m in masks if m.numel() == rows and x.shape[:-1] in (m.shape, (rows,))]
        key = (rows, x.device, tuple(map(id, fit)))
        if key not in known:
            real = [mask.reshape(-1).to(x.device) != 0 for mask in fit]
            weight = torch.stack(real).all(0) if real else None
            known[key] = self._spread(rows, row_weight=weight, shift=self._shift, device=x.device)
        return known[key]
