"""A chat without a terminal: lines are read, and answers are printed as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

from trimtab.chat.answers import Answer, OnBoth, OnText
from trimtab.errors import TrimtabError
from trimtab.terminal import write_text


class Plain:
    """Answers on standard output and all else on standard error, so that a pipe has answers only;
    `quiet` shows nothing, for whoever prints the whole conversation at the end."""

    def __init__(self, *, receipts: bool = False, quiet: bool = False) -> None:
        self.receipts, self._quiet = receipts, quiet

    def say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr)

    def answer(self, write: Callable[[OnText], Answer]) -> Answer:
        answer = write(lambda piece: None)
        self._print(answer.text)
        _end_where_stopped(answer)
        return answer

    def both(
        self, write: Callable[[OnBoth], tuple[Answer, Answer]], heads: tuple[str, str]
    ) -> tuple[Answer, Answer]:
        answers = write(lambda place, piece: None)
        for head, answer in zip(heads, answers, strict=True):
            self._print(f"{head}: {answer.text}")
            _end_where_stopped(answer)
        return answers

    def _print(self, text: str) -> None:
        if not self._quiet:
            write_text(text)
            sys.stdout.flush()


def _end_where_stopped(answer: Answer) -> None:
    """Ctrl-C ends a program that nobody types to."""
    if answer.receipt.stopped:
        raise KeyboardInterrupt


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Lines, of which one that ends with a backslash goes on with the next."""
    begun: list[str] = []
    for line in _decoded(lines):
        text = line.rstrip("\r\n")
        if text.endswith("\\"):
            begun.append(text[:-1])
        else:
            yield "\n".join([*begun, text])
            begun = []
    if begun:
        yield "\n".join(begun)


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise TrimtabError("standard input is not UTF-8 text") from error
