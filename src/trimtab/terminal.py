"""What reaches a terminal: text of models, files and servers, which is shown and never obeyed; and
what long work is going on, on standard error: bars and spinners, none where that is not a terminal,
bars in notebooks too, and notes. Work inside other work gets a line under the other's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

#: Characters that a terminal obeys, or that change how the text around them reads: control
#: characters but newline and tab, marks of direction, line separators, halves of surrogate pairs.
_OBEYED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    "|\r(?!\n)"
)


def printable(text: str) -> str:
    """The text with each character that a terminal would obey as its escape: ESC is \\x1b."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody looks on; a closed stream is None."""
    return stream is not None and stream.isatty()


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook, whose standard error is no terminal."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


def write_text(text: str) -> None:
    """A line on standard output: exactly as it is into a pipe or file, printable on a terminal."""
    print(printable(text) if is_terminal(sys.stdout) else text)


class CleanConsole(Console):
    """A console on which text is text: no markup, no emoji, no control characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, markup=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        raise  # what was caught goes on to who runs the command


class Advance(Protocol):
    """Moves a bar on by some steps; `said` takes the place of what it showed as its work."""

    def __call__(self, steps: int, said: str | None = None) -> object: ...


#: Who hears of work: what it is, and how many of its steps are done.
Heard = Callable[[str, int, int], object]
_hearing: ContextVar[Heard | None] = ContextVar("hearing", default=None)
#: The bars of the work that is going on.
_shown: list[Progress] = []


@contextmanager
def watched(hear: Heard) -> Iterator[None]:
    """Tells `hear` of the progress of all work inside, for whoever shows it elsewhere than in a
    terminal."""
    token = _hearing.set(hear)
    try:
        yield
    finally:
        _hearing.reset(token)


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Shows `what` with a bar; the block is handed a function that moves it on by some steps."""
    hear = _hearing.get()
    with _bar(what, total) as advance:
        yield advance if hear is None else _telling(advance, hear, what, total)


def _telling(advance: Advance, hear: Heard, what: str, total: int) -> Advance:
    """The same function, which also tells."""
    done = 0
    hear(what, done, total)

    def move(steps: int, said: str | None = None) -> None:
        nonlocal done, what
        done, what = done + steps, what if said is None else said
        advance(steps, said)
        hear(what, done, total)

    return move


@contextmanager
def _bar(what: str, total: int) -> Iterator[Advance]:
    if in_notebook():
        from tqdm.auto import tqdm  # a widget, or text where there are no widgets

        with tqdm(desc=printable(what), total=total, leave=False) as shown:

            def move(steps: int, said: str | None = None) -> None:
                if said is not None:
                    shown.set_description(printable(said), refresh=False)
                shown.update(steps)

            yield move
        return
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


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Shows `what` with a spinner, for work whose length nobody knows; the block is handed a
    function that says another step."""
    if not is_terminal(sys.stderr):
        yield lambda text: None
    elif _shown:
        bar = _shown[-1]
        task = bar.add_task(printable(what), total=None)
        try:
            yield lambda text: bar.update(task, description=printable(text))
        finally:
            bar.remove_task(task)
    else:
        # The stream of now: some work redirects sys.stderr for a while.
        with CleanConsole(file=sys.stderr).status(printable(what)) as spinner:
            yield lambda text: spinner.update(printable(text))


def note(text: str) -> None:
    """One line on standard error about work that is going on, also where that is no terminal."""
    with suppress(OSError, ValueError):  # nobody reads it
        print(f"trimtab: {printable(text)}", file=sys.stderr, flush=True)


def _line(bar: Progress, what: str, total: int) -> Iterator[Advance]:
    task = bar.add_task(printable(what), total=total)

    def move(steps: int, said: str | None = None) -> None:
        description = None if said is None else printable(said)
        bar.update(task, advance=steps, description=description)

    try:
        yield move
    finally:
        bar.remove_task(task)
