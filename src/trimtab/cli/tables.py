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
#: What runs leave for people to look at, as far as it is there.
LEFT = (
    *("report.html", "results.json", "best.safetensors", "records.jsonl"),
    *("pictures/", "tables/"),
)


def show(
    tables: Sequence[Table],
    notes: Sequence[str],
    output: str | Path | None,
    files: Sequence[str] = LEFT,
    *,
    summary: str = "",
) -> None:
    """What was found in a sentence, the tables of a result with at most so many rows, what to know,
    and the files it left."""
    from rich.table import Table as RichTable

    # Intervals make tables wide; where no terminal ends the line they need not be folded.
    wide = console if console.is_terminal else CleanConsole(width=200)
    if summary:
        console.print(summary)
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
        show_files(output, files)


def show_files(output: str | Path, files: Sequence[str] = LEFT) -> None:
    """The files and folders of a run, those that are there."""
    there = [name for name in files if Path(output, name).exists()]
    console.print(f"{output}: {', '.join(there)}", style="dim")
