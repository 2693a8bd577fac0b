"""Progress bars of long work: on standard error, and none where that is not a terminal. Work inside
other work gets a line under the other's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimtab.terminal import CleanConsole, is_terminal, printable

#: The bars of the work that is going on.
_shown: list[Progress] = []


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows `what` with a bar; the block is handed a function that moves it on by some steps."""
    if _shown:
        yield from _line(_shown[-1], what, total)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=CleanConsole(stderr=True),
        disable=not is_terminal(sys.stderr),
        transient=True,
    ) as bar:
        _shown.append(bar)
        try:
            yield from _line(bar, what, total)
        finally:
            _shown.remove(bar)


def _line(bar: Progress, what: str, total: int) -> Iterator[Callable[[int], None]]:
    task = bar.add_task(printable(what), total=total)
    try:
        yield lambda steps: bar.advance(task, steps)
    finally:
        bar.remove_task(task)
