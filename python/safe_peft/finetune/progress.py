"""Progress: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Tick(Protocol):
    """Say that one more unit of work is done, and what there is to say about it."""

    def __call__(self, note: str = "") -> None: ...


@contextmanager
def progress(title: str, total: int, console: Console, lines: int = 5) -> Iterator[Tick]:
    """Show the progress of `total` units of work.

    Args:
        title: what is done.
        total: units of work.
        console: where to show it.
        lines: how many lines to print where the console is no terminal.

    Yields:
        The function to call after each unit.

    Example:
        >>> with progress("train", 2, Console(quiet=True)) as tick:
        ...     tick("loss 0.7")
        ...     tick("loss 0.6")
    """
    if console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda note="": bar.update(task, advance=1, note=note)
        return
    done, every = 0, max(1, -(-total // max(1, lines)))

    def tick(note: str = "") -> None:
        nonlocal done
        done += 1
        if done % every == 0 or done == total:
            console.print(f"{title}  {done}/{total}  {note}".rstrip(), highlight=False, markup=False)

    yield tick


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TextColumn("eta"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console
    )
