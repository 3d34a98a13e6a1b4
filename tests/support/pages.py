"""Tables in the README and the docs, as tests read them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def table(page: str, first: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading is `first`: what stands in the first cell, and the cells after it."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    rows = {}
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)  # the line of dashes
            break
    for line in lines:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows
