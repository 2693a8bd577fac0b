"""What a result says to people in a terminal: its tables, its notes, and where its files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.cli.common import console
from trimtab.terminal import CleanConsole

if TYPE_CHECKING:
    from trimtab.reports import Table

#: Rows of a table that are shown in a terminal; the report has all.
_SHOWN = 30


def show(
    tables: Sequence[Table],
    notes: Sequence[str],
    output: str | Path | None,
    files: Sequence[str] = ("report.html", "results.json", "best.safetensors", "pictures/"),
) -> None:
    """The tables of a result with at most so many rows, what to know, and the files it left."""
    from rich.table import Table as RichTable

    # Intervals make tables wide; where no terminal ends the line they need not be folded.
    wide = console if console.is_terminal else CleanConsole(width=200)
    for table in tables:
        shown = RichTable(*map(str, table.heads), title=table.title, title_justify="left")
        for row in table.rows[:_SHOWN]:
            shown.add_row(*map(str, row))
        wide.print(shown)
        if len(table.rows) > _SHOWN:
            more = f"{_SHOWN} of {len(table.rows)} rows"
            console.print(f"{more}{'; the report has all' if output else ''}", style="dim")
    for note in notes:
        console.print(f"note: {note}")
    if output is not None:
        say_files(output, files)


def say_files(output: str | Path, files: Sequence[str]) -> None:
    """Those of the files of a run that are there: not every one leaves pictures or a steering."""
    there = [file for file in files if Path(output, file).exists()]
    console.print(f"{output}: {', '.join(there)}", style="dim")
