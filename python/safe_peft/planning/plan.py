"""A memory plan as plain data: where each byte of a training step goes, for stock PEFT and for the fast path."""

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
    """The memory of one training step, in bytes.

    Args:
        retained: bytes kept for backward, without parameters, each storage once.
        by_part: the same bytes by the part that keeps them.
        by_block: the same bytes by transformer block, lowest first.
        step: the largest size of the step's own tensors at one time, gradients included.
        peak: `step` with parameters, buffers, optimizer state and the batch.
    """

    retained: int
    by_part: dict[str, int]
    by_block: dict[str, int]
    step: int
    peak: int


@dataclass(frozen=True)
class GroupRow:
    """Adapters that read the same tensors: freezing only one of them frees little.

    Args:
        block: the transformer block; "" outside the blocks.
        adapters: names of the group's adapters.
        holds: bytes that they keep for their own gradients, even if others keep them too.
        frees: bytes that the fast path would free if all of them froze too.
        stock_frees: the same for stock PEFT.
    """

    block: str
    adapters: tuple[str, ...]
    holds: int
    frees: int
    stock_frees: int


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training step, known before any training; printing it gives tables.

    Args:
        model: name of the planned model.
        batch: the shapes of its batch, as text.
        adapters: number of adapters.
        frozen: names of the frozen adapters.
        recompute: names of the blocks that run again in backward.
        stock: stock PEFT with the same adapters frozen.
        ours: the same model bound.
        parameters: bytes of the model's parameters and buffers.
        inputs: bytes of the batch.
        gradients: bytes of all gradients at the end of backward.
        optimizer: bytes of the optimizer's state.
        groups: bytes that freezing would free, by group of adapters, in the model's order.
        blocks: bytes that freezing all adapters of a block would free.
        device: the kind of device that the plan is for; "" for any.
        prefix: number of frozen blocks at the bottom, whose output `prefix_cache` keeps.
        prefix_sample: bytes that `prefix_cache` keeps per sample without padding; they are not part of the peak.

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
    prefix: int = 0
    prefix_sample: int = 0

    @property
    def ratio(self) -> float:
        """Retained bytes of the fast path, divided by those of stock PEFT."""
        return self.ours.retained / self.stock.retained if self.stock.retained else 1.0

    def __str__(self) -> str:
        frees = dict(self.blocks)
        blocks = [(*row, _mib(frees.get(row[0]))) for row in _sides(self.stock.by_block, self.ours.by_block)]
        peaks = [
            ("parameters and buffers", self.parameters, self.parameters),
            ("optimizer state", self.optimizer, self.optimizer),
            ("batch", self.inputs, self.inputs),
            (f"step, at most (gradients {self.gradients / MIB:,.2f})", self.stock.step, self.ours.step),
            ("peak", self.stock.peak, self.ours.peak),
        ]
        tables: list[Sequence[Sequence[str]]] = [
            [("retained by", "stock", "ours"), *_sides(self.stock.by_part, self.ours.by_part)],
            [("block", "stock", "ours", "freed if frozen"), *blocks],
            [("", "stock", "ours"), *((name, _mib(stock), _mib(ours)) for name, stock, ours in peaks)],
        ]
        frozen = f"{len(self.frozen)} of {self.adapters} adapters frozen"
        again = f", {len(self.recompute)} blocks recomputed" if self.recompute else ""
        where = f", {self.device}" if self.device else ""
        head = f"{self.model}, {self.batch}{where}: {frozen}{again}; MiB of one training step"
        kept = f"{self.prefix_sample / 1024:,.1f} KiB per sample"
        cached = f"prefix_cache keeps {kept}; frozen blocks below the cut: {self.prefix}"
        return "\n\n".join([head, *map(text_table, tables), *([cached] if self.prefix else [])])

    def groups_table(self) -> str:
        """Return the MiB that freezing each group of adapters would free, as a text table."""
        rows = [
            (", ".join(row.adapters), _mib(row.holds), _mib(row.stock_frees), _mib(row.frees)) for row in self.groups
        ]
        return text_table([("adapters", "retain", "freed if frozen, stock", "freed if frozen, ours"), *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values; `from_dict` reads them."""
        return jsonio.encode(self)

    @classmethod
    def from_dict(cls, data: Any) -> MemoryPlan:
        """Read the output of `to_dict`.

        Args:
            data: the JSON values.

        Raises:
            StateError: A part is missing or of the wrong type.
        """
        return jsonio.decode(cls, data, "plan")

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, atomically. An existing file is replaced."""
        jsonio.write_json(path, self)

    def picture(self) -> Figure:
        """Draw where each byte goes, stock PEFT and the fast path; the figure is not registered in pyplot."""
        from .figure import draw_plans

        return draw_plans([("", self)])

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write the picture as a PNG file, atomically. An existing file is replaced."""
        from .figure import png_of

        jsonio.replace_file(path, png_of(self.picture()))


def parts_cells(plans: Sequence[tuple[str, MemoryPlan]]) -> list[list[str]]:
    """Return several plans of one model side by side: a header, then one row per part that keeps bytes.

    Each plan has a heading, such as "start".
    """
    heads = [f"{side}, {name}" if name else side for name, _ in plans for side in ("stock", "ours")]
    sides = [side for _, plan in plans for side in (plan.stock, plan.ours)]
    rows = [["retained by, MiB", *heads]]
    rows += [[part, *map(_mib, sizes)] for part, sizes in merged(*(side.by_part for side in sides)).items()]
    return [*rows, ["retained", *(_mib(side.retained) for side in sides)]]


def _sides(stock: dict[str, int], ours: dict[str, int]) -> list[tuple[str, ...]]:
    rows = [(name, *map(_mib, sizes)) for name, sizes in merged(stock, ours).items()]
    return [*rows, ("retained", _mib(sum(stock.values())), _mib(sum(ours.values())))]


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.2f}"


def text_table(rows: Sequence[Sequence[str]], title: str = "", left: int = 1) -> str:
    """Return a table as plain text, the heads first; the first `left` columns hold words and are aligned to the left.

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
