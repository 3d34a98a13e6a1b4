"""A memory plan as plain data: where each byte of a training step goes, for stock PEFT and for ours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..files import jsonio
from .retained import MIB, merged

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Side:
    """What one training step costs, in bytes.

    Args:
        retained: kept for backward, parameters aside, each storage once.
        by_part: the same by what keeps it.
        by_block: the same by transformer block, lowest first.
        step: the most that the step's own tensors occupy at a time, gradients included.
        peak: with parameters, buffers, optimizer state and the batch.
    """

    retained: int
    by_part: dict[str, int]
    by_block: dict[str, int]
    step: int
    peak: int


@dataclass(frozen=True)
class GroupRow:
    """Adapters that read the same tensors: freezing one of them alone frees little.

    Args:
        block: the transformer block, or "" outside.
        adapters: their names.
        holds: bytes they hold for their own gradients, even if others hold them too.
        frees: bytes that ours would retain less with all of them frozen besides what is frozen.
        stock_frees: the same for stock PEFT.
    """

    block: str
    adapters: tuple[str, ...]
    holds: int
    frees: int
    stock_frees: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step will cost, told before any training; printing it gives tables.

    Args:
        model: what is planned for.
        batch: the shapes of its batch, for people to read.
        adapters: how many adapters there are.
        frozen: names of those that are frozen.
        recompute: names of the blocks that run again in backward.
        stock: stock PEFT with the same adapters frozen.
        ours: the same model bound.
        parameters: bytes of the model's parameters and buffers.
        inputs: bytes of the batch.
        gradients: bytes of all gradients at the end of backward.
        optimizer: bytes of the optimizer's state.
        groups: what freezing would free, group by group, the model's order.
        blocks: bytes that freezing all of a block's adapters would free.
        device: the kind of device that it is for, "" for any.

    Example:
        >>> print(plan_memory(model, batch_size=8, sequence_length=512, frozen=0.5))  # doctest: +SKIP
    """

    model: str
    batch: str
    adapters: int
    frozen: tuple[str, ...]
    recompute: tuple[str, ...]
    stock: Side
    ours: Side
    parameters: int
    inputs: int
    gradients: int
    optimizer: int
    groups: tuple[GroupRow, ...] = ()
    blocks: tuple[tuple[str, int], ...] = ()
    device: str = ""

    @property
    def ratio(self) -> float:
        """Bytes retained by ours over stock's."""
        return self.ours.retained / self.stock.retained if self.stock.retained else 1.0

    def __str__(self) -> str:
        parts = text_table([("kept by", "stock", "ours"), *_sides(self.stock.by_part, self.ours.by_part)])
        frees, sides = dict(self.blocks), _sides(self.stock.by_block, self.ours.by_block)
        rows = [(*row, _mib(frees.get(row[0]))) for row in sides]
        blocks = text_table([("block", "stock", "ours", "frozen whole, frees"), *rows])
        frozen = f"{len(self.frozen)} of {self.adapters} adapters frozen"
        again = f", {len(self.recompute)} blocks recomputed" if self.recompute else ""
        where = f", {self.device}" if self.device else ""
        head = f"{self.model}, {self.batch}{where}: {frozen}{again}; MiB of one training step"
        return "\n\n".join([head, parts, blocks, self._peaks()])

    def _peaks(self) -> str:
        rows = [
            ("parameters and buffers", self.parameters, self.parameters),
            ("optimizer state", self.optimizer, self.optimizer),
            ("batch", self.inputs, self.inputs),
            (f"step, at most (gradients {self.gradients / MIB:,.2f})", self.stock.step, self.ours.step),
            ("peak", self.stock.peak, self.ours.peak),
        ]
        return text_table([("", "stock", "ours"), *((name, _mib(stock), _mib(ours)) for name, stock, ours in rows)])

    def groups_table(self) -> str:
        """Return what freezing each group of adapters would free, as text.

        Example:
            >>> print(plan.groups_table())  # doctest: +SKIP
        """
        rows = [
            (", ".join(row.adapters), _mib(row.holds), _mib(row.stock_frees), _mib(row.frees)) for row in self.groups
        ]
        return text_table([("adapters", "hold", "frozen, free in stock", "in ours"), *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values.

        Example:
            >>> MemoryPlan.from_dict(plan.to_dict()) == plan  # doctest: +SKIP
            True
        """
        data: dict[str, Any] = jsonio.encode(self)
        return data

    @classmethod
    def from_dict(cls, data: Any) -> MemoryPlan:
        """Read what `to_dict` wrote.

        Args:
            data: the JSON values.

        Raises:
            StateError: A part is missing or of the wrong type.
        """
        plan: MemoryPlan = jsonio.decode(cls, data, "plan")
        return plan

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Args:
            path: the file to write or replace.

        Example:
            >>> plan.save_json("plan.json")  # doctest: +SKIP
        """
        jsonio.write_json(path, self)

    def picture(self) -> Figure:
        """Draw where each byte goes, stock against ours.

        Returns:
            A figure on matplotlib's Agg canvas, known to no global state.

        Example:
            >>> plan.picture().savefig("plan.png")  # doctest: +SKIP
        """
        from .figure import draw_plans

        return draw_plans([("", self)])

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as a PNG file, atomically.

        Args:
            path: the file to write or replace.

        Example:
            >>> plan.save_png("plan.png")  # doctest: +SKIP
        """
        from .figure import png_of

        jsonio.replace_file(path, png_of(self.picture()))


def parts_cells(plans: Sequence[tuple[str, MemoryPlan]]) -> list[list[str]]:
    """Lay out several plans of one model side by side as text: a header, then one row for what keeps bytes.

    Args:
        plans: with a heading each, such as "start".

    Example:
        >>> parts_cells([])
        [['kept by, MiB'], ['retained']]
    """
    heads = [f"{side}, {name}" if name else side for name, _ in plans for side in ("stock", "ours")]
    sides = [side for _, plan in plans for side in (plan.stock, plan.ours)]
    rows = [["kept by, MiB", *heads]]
    rows += [[part, *map(_mib, sizes)] for part, sizes in merged(*(side.by_part for side in sides)).items()]
    return [*rows, ["retained", *(_mib(side.retained) for side in sides)]]


def _sides(stock: dict[str, int], ours: dict[str, int]) -> list[tuple[str, ...]]:
    rows = [(name, *map(_mib, sizes)) for name, sizes in merged(stock, ours).items()]
    return [*rows, ("retained", _mib(sum(stock.values())), _mib(sum(ours.values())))]


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.2f}"


def text_table(rows: Sequence[Sequence[str]], title: str = "", left: int = 1) -> str:
    """Lay out a table as plain text.

    Args:
        rows: the heads first; all of one length.
        title: a line above.
        left: how many columns hold words, which begin at the left; numbers end at the right.

    Example:
        >>> print(text_table([["part", "MiB"], ["norms", "9.5"]]))
        part   MiB
        norms  9.5
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title] if title else []
    for row in rows:
        cells = [f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
