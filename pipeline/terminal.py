"""What a terminal shows beside plain lines: progress bars and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """A progress bar on a terminal; elsewhere only the lines it is told to say; nothing where it is not ``shown``."""

    def __init__(self, unit: str, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, quiet=not shown)
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.rich = Progress(*columns, console=self.console, disable=not (shown and self.console.is_terminal))
        self.task: Any = None

    def start(self, total: int) -> None:
        """Show it, at nothing of ``total``."""
        self.task = self.rich.add_task("", total=total, note="")

    def advance(self, amount: int, note: str = "") -> None:
        """Move it on; ``note`` stands beside it."""
        self.rich.update(self.task, advance=amount, note=note)

    def say(self, line: str) -> None:
        """Print a line above it."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(unit: str, shown: bool = True) -> Iterator[Bar]:
    """A bar that counts ``unit`` and goes away at the end."""
    bar = Bar(unit, shown)
    with bar.rich:
        yield bar


def echo_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print a table; what is not whole has three digits after the point."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        table.add_column(name, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(_plain, row))
    # Rich would cut a table to 80 columns where there is no terminal to ask for its width.
    width = None if sys.stdout.isatty() else 200
    Console(file=sys.stdout, width=width, markup=False, emoji=False).print(table)


def _plain(value: object) -> str:
    """A cell of a table: three digits after the point where it is not whole, nothing where there is nothing."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
