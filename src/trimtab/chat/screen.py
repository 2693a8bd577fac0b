"""A chat on a terminal: answers as markdown while they are written, two of them side by side."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from trimtab.chat.answers import Answer, OnBoth, OnText
from trimtab.terminal import CleanConsole, is_terminal, printable

termios: Any
try:
    import termios
except ImportError:  # Windows
    termios = None

#: Lines of the screen that an answer leaves free while it is written.
_FREE = 3
#: Seconds between two drawings of what changes.
_SECONDS = 0.1
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Screen:
    """Shows a chat on a console. Markup and control characters of answers are shown, not obeyed."""

    def __init__(self, console: Console | None = None, *, receipts: bool = True) -> None:
        self.receipts = receipts
        self.console = console or CleanConsole()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim")

    def answer(self, write: Callable[[OnText], Answer]) -> Answer:
        with _answering(), _Written(self.console) as written:
            answer = write(written.add)
        return answer

    def both(
        self, write: Callable[[OnBoth], tuple[Answer, Answer]], heads: tuple[str, str]
    ) -> tuple[Answer, Answer]:
        texts = ["", ""]
        with _answering(), _Changing(self.console) as live:

            def add(place: int, piece: str) -> None:
                texts[place] += piece
                live.change(_Tail(_columns(heads, texts)))

            answers = write(add)
        self.console.print(_columns(heads, [answer.text for answer in answers]))
        return answers


class _Written:
    """An answer that is being written: paragraphs that are whole stand on the screen for good, the
    last one changes."""

    def __init__(self, console: Console) -> None:
        self._console, self._text = console, ""
        self._live = _Changing(console)

    def __enter__(self) -> _Written:
        self._live.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._live.update(Text(""))
        self._live.__exit__(*raised)
        if self._text.strip():
            self._console.print(markdown(self._text))

    def add(self, piece: str) -> None:
        self._text += piece
        whole = whole_blocks(self._text)
        if whole:
            done, self._text = self._text[:whole], self._text[whole:]
            self._live.update(Text(""))
            self._console.print(markdown(done))
            self._console.print()
        self._live.change(_Tail(markdown(self._text)))


class _Changing(Live):
    """What changes on the screen, and is gone when it ends. Who changes it draws it, a few times a
    second: a thread of its own would mix its lines with those that are printed meanwhile."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console=console, transient=True, vertical_overflow="crop", auto_refresh=False
        )
        self._drawn = 0.0

    def change(self, shown: RenderableType) -> None:
        due = time.monotonic() - self._drawn >= _SECONDS
        if due:
            self._drawn = time.monotonic()
        self.update(shown, refresh=due)


def whole_blocks(text: str) -> int:
    """How many characters at the beginning of markdown are blocks that nothing after them changes:
    up to the last blank line outside of fences after which a line begins at the margin."""
    whole, place, fence, blank = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        marker = _FENCE.match(line)
        if blank and not fence and line[:1].strip():
            whole = place
        if marker and not fence:
            fence = marker[1]
        elif marker and marker[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        blank = not line.strip() and line.endswith("\n")
        place += len(line)
    return whole


def markdown(text: str) -> RenderableType:
    """Markdown in which HTML is text, and addresses of links are seen."""
    shown = Markdown("", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
    shown.parsed = parser.parse(printable(text))
    return _Clean(shown)


def _columns(heads: tuple[str, str], texts: list[str]) -> RenderableType:
    table = Table(expand=True, show_lines=False)
    for head in heads:
        table.add_column(printable(head), ratio=1, overflow="fold")
    table.add_row(*map(markdown, texts))
    return table


class _Clean:
    """What it shows without characters that a terminal obeys: markdown can write them as
    entities."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._content, options):
            yield Segment(printable(segment.text), segment.style, segment.control)


class _Tail:
    """The last lines of what it shows, as many as the screen has room for."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(1, console.height - _FREE)
        lines = console.render_lines(self._content, options, pad=False)[-room:]
        for number, line in enumerate(lines):
            if number:  # a line end behind the last one would be a line more than is cleared
                yield Segment.line()
            yield from line


@contextmanager
def _answering() -> Iterator[None]:
    """While an answer is written Ctrl-C ends it, and more of them are one; what is typed does not
    show in the middle of it, and is there for the next line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, once)
    try:
        with _silent_keys():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _silent_keys() -> Iterator[None]:
    """A terminal that does not show what is typed."""
    if termios is None or not is_terminal(sys.stdin):
        yield
        return
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(keys, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(keys, termios.TCSANOW, before)
