"""Named views of the sums that score an adapter, and of the scored rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_kernels import reference


@dataclass(frozen=True)
class RowBlocks:
    """The rows of the flattened batch that score an adapter.

    The caller passes the rows, so that every backend scores the same ones. Each block is centred separately.

    Args:
        starts: int64 [n], the first row of each block.
        block_rows: rows per block.
        row_weight: [N] bool or number, zero where a row is padding; None counts every row.

    Raises:
        TypeError: `starts` is not a tensor.

    Example:
        >>> import safe_kernels
        >>> safe_kernels.RowBlocks.spread(1000, blocks=3).starts.tolist()
        [0, 256, 640]
    """

    starts: Tensor
    block_rows: int = 128
    row_weight: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.starts, Tensor):
            raise TypeError(f"starts must be an int64 tensor [n], got {type(self.starts).__name__}")

    @classmethod
    def spread(
        cls,
        num_rows: int,
        blocks: int = 4,
        block_rows: int = 128,
        row_weight: Tensor | None = None,
        shift: int = 0,
        device: torch.device | str = "cpu",
    ) -> RowBlocks:
        """Blocks spread evenly over a batch, aligned to `block_rows`.

        Args:
            num_rows: rows of the flattened batch.
            blocks: largest number of blocks; a small batch has fewer.
            block_rows: rows per block.
            row_weight: [num_rows], zero where a row is padding.
            shift: moves every block by this many blocks, cyclically, so that successive scoring steps use other rows.
            device: device of `starts`.

        Returns:
            The blocks, in ascending order.

        Raises:
            ValueError: `blocks` or `block_rows` is less than 1, or `num_rows` is less than 0.
            TypeError: one of them, or `shift`, is not an integer.

        Example:
            >>> import safe_kernels
            >>> safe_kernels.RowBlocks.spread(1000, blocks=3, shift=1).starts.tolist()
            [128, 384, 768]
        """
        counts = {"num_rows": num_rows, "blocks": blocks, "block_rows": block_rows, "shift": shift}
        for name, value in counts.items():
            if not isinstance(value, int | torch.SymInt):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if blocks < 1 or block_rows < 1 or num_rows < 0:
            raise ValueError(
                f"blocks and block_rows must be at least 1 and num_rows at least 0, got {blocks}, {block_rows} and "
                f"{num_rows}"
            )
        available = -(-num_rows // block_rows)
        chosen = min(blocks, available)
        starts = sorted((i * available // chosen + shift) % available * block_rows for i in range(chosen))
        return cls(torch.tensor(starts, dtype=torch.int64, device=device), block_rows, row_weight)


class AdapterStatistics:
    """The additive sums (a, b, c, rows) of one adapter: a named view of four float64 numbers.

    Sums of several calls, micro-batches or processes may simply be added. Doubling all sums does not change the score.
    The formulas are in `safe_kernels.reference.cka_sums` and `one_minus_cka`.

    Args:
        sums: float64 [4] to add into, for instance one row of a buffer for all adapters; None: a new tensor.
        blocks: the rows to score at the next call; None scores nothing.

    Raises:
        TypeError: `sums` is not a tensor, or requires grad, or `blocks` is not a `RowBlocks`.
        ValueError: `sums` is not a float64 tensor of shape [4].

    Example:
        >>> import torch, safe_kernels
        >>> x, base = torch.randn(256, 16), torch.randn(256, 32)
        >>> A, B = torch.randn(4, 16), torch.zeros(32, 4)
        >>> statistics = safe_kernels.AdapterStatistics(blocks=safe_kernels.RowBlocks.spread(256))
        >>> out = safe_kernels.lora(x, base, A, B, 2.0, statistics=statistics)
        >>> statistics.one_minus_cka(), statistics.rows
        (0.0, 256.0)
    """

    def __init__(self, sums: Tensor | None = None, blocks: RowBlocks | None = None) -> None:
        if sums is None:
            sums = torch.zeros(4, dtype=torch.float64)
        if not isinstance(sums, Tensor) or sums.requires_grad:
            got = "one that requires grad" if isinstance(sums, Tensor) else type(sums).__name__
            raise TypeError(f"sums must be a tensor without a gradient, since it is added to in place, got {got}")
        if blocks is not None and not isinstance(blocks, RowBlocks):
            raise TypeError(f"blocks must be RowBlocks or None, got {type(blocks).__name__}")
        if sums.dtype != torch.float64 or sums.shape != (4,):
            raise ValueError(f"sums must be a float64 tensor of shape [4], got {sums.dtype} {list(sums.shape)}")
        self.sums = sums
        self.blocks = blocks

    @property
    def a(self) -> float:
        """|K|^2."""
        return float(self.sums[0])

    @property
    def b(self) -> float:
        """<K, E>."""
        return float(self.sums[1])

    @property
    def c(self) -> float:
        """|E|^2."""
        return float(self.sums[2])

    @property
    def rows(self) -> float:
        """Number of scored rows."""
        return float(self.sums[3])

    def add_(self, sums: Tensor) -> None:
        """Adds the sums of another call, from any device."""
        self.sums.add_(sums if sums.device == self.sums.device else sums.to(self.sums.device))

    def take(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Copies the rows to score, for a layer that no kernel of this package computes.

        Args:
            features: [..., d].

        Returns:
            float64 [n * block_rows, d], and bool [n * block_rows]: whether a row counts. A block that exceeds the last
            row is padded with rows that do not count.

        Raises:
            ValueError: `blocks` is None.

        Example:
            >>> import torch, safe_kernels
            >>> blocks = safe_kernels.RowBlocks.spread(3, block_rows=4)
            >>> rows, counts = safe_kernels.AdapterStatistics(blocks=blocks).take(torch.ones(3, 2))
            >>> list(rows.shape), counts.tolist()
            ([4, 2], [True, True, True, False])
        """
        blocks = self._blocks()
        rows = features.detach().reshape(-1, features.shape[-1])
        index = blocks.starts[:, None] + torch.arange(blocks.block_rows, device=features.device)
        counts = index.flatten() < rows.shape[0]
        index = index.flatten().clamp(max=rows.shape[0] - 1)
        if blocks.row_weight is not None:
            counts = counts & (blocks.row_weight[index] != 0)
        return rows[index].to(torch.float64), counts

    def add_features(self, base: Tensor, output: Tensor, counts: Tensor) -> None:
        """Adds the sums of rows that `take` copied.

        Args:
            base: [n * block_rows, d], features without the adapter.
            output: [n * block_rows, d], features with the adapter.
            counts: [n * block_rows], whether a row counts.

        Raises:
            ValueError: `blocks` is None.

        Example:
            >>> import torch, safe_kernels
            >>> statistics = safe_kernels.AdapterStatistics(blocks=safe_kernels.RowBlocks.spread(64))
            >>> rows, counts = statistics.take(torch.randn(64, 8))
            >>> statistics.add_features(rows, rows, counts)
            >>> statistics.one_minus_cka(), statistics.rows
            (0.0, 64.0)
        """
        block_rows = self._blocks().block_rows
        starts = torch.arange(0, base.shape[0], block_rows, device=base.device)
        self.add_(reference.cka_sums(base, output - base, starts, block_rows, counts))

    def _blocks(self) -> RowBlocks:
        if self.blocks is None:
            raise ValueError("blocks is None, so no row scores; pass blocks=RowBlocks.spread(num_rows)")
        return self.blocks

    def zero_(self) -> None:
        """Sets all sums to zero."""
        self.sums.zero_()

    def all_reduce_(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Adds the sums of every process."""
        torch.distributed.all_reduce(self.sums, group=group)

    def one_minus_cka(self) -> float:
        """The importance: see `safe_kernels.reference.one_minus_cka`."""
        return reference.one_minus_cka(self.sums)
