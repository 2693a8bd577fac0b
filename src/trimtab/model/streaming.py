"""Text as it is written: the pieces of each row while its tokens come, and a function that hands on
its pieces turned into an iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from trimtab.anatomy import on_behalf_of_this_thread
from trimtab.errors import TrimtabError

#: What is called with the place of a prompt and the next piece of its text.
OnText = Callable[[int, str], object]
#: Stands for the bytes of a character that has not come whole.
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Growing:
    """A text that is being written, and what of it was handed on. Kept back is what may still
    change: the bytes of a character that is not whole, and what may be the beginning of one of the
    `stops`, before which the text would end."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops, self._said = stops, ""

    def more(self, text: str) -> str:
        """What is handed on of the text as it stands now."""
        sure = text.rstrip(_BROKEN)
        return self.rest(sure[: len(sure) - _begun(sure, self._stops)])

    def rest(self, text: str) -> str:
        """What is handed on of the whole text."""
        said = self._said
        # Shorter for a moment where a tokenizer takes back a space before a comma.
        if len(text) <= len(said) or not text.startswith(said):
            return ""
        self._said = text
        return text[len(said) :]


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    lengths = (
        length
        for stop in stops
        for length in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:length])
    )
    return max(lengths, default=0)


def check_on_text(on_text: Any, beams: int) -> None:
    """Refuse what cannot be called, and beams, whose text is known at the end only."""
    if not callable(on_text):
        raise TrimtabError(f"on_text must be a function of a prompt's place and text: {on_text!r}")
    if beams > 1:
        raise TrimtabError(
            "beams are compared when they are whole: text as it is written takes num_beams 1"
        )


class Pieces(BaseStreamer):
    """Hands on the text of the rows of one batch while `model.generate` chooses their tokens.

    `places` are the prompts' among all of them. What was handed on and `finish` together are the
    row's text.
    """

    def __init__(self, tokenizer: Any, places: Sequence[int], on_text: OnText) -> None:
        self.tokenizer, self.places, self.on_text = tokenizer, places, on_text
        self.stops: set[int] = set()
        self.ended: Callable[[int], bool] = lambda row: False
        #: What the caller's function raised.
        self.raised: Exception | None = None
        self._tokens: list[list[int]] | None = None
        self._growing = [Growing() for _ in places]
        self._closed: set[int] = set()

    def begin(self, stops: set[int], ended: Callable[[int], bool]) -> None:
        """Before the model writes: the tokens that end a row, and what tells that one has ended."""
        self.stops, self.ended = stops, ended

    def put(self, value: Tensor) -> None:
        """The prompts, and then each next token, [rows]."""
        if self._tokens is None:
            self._tokens = [[] for _ in self.places]
            return
        for row, token in enumerate(value.flatten().tolist()):
            if token in self.stops or self.ended(row):
                self._closed.add(row)
            if row not in self._closed:
                self._tokens[row].append(token)
                text = self.tokenizer.decode(self._tokens[row], skip_special_tokens=True)
                self._say(row, self._growing[row].more(text))

    def end(self) -> None:
        """All rows have ended; `finish` says the rest of each."""

    def finish(self, row: int, text: str) -> None:
        """The whole text of a row, of which the rest is handed on."""
        self._say(row, self._growing[row].rest(text))

    def _say(self, row: int, piece: str) -> None:
        if piece:
            try:
                self.on_text(self.places[row], piece)
            except Exception as error:
                self.raised = error
                raise


class _LeftError(Exception):
    """Nobody asks for more."""


def iterated(write: Callable[[Callable[[str], None]], object]) -> Iterator[str]:
    """What `write` hands to its callback, piece by piece.

    It runs in a thread of its own, which works only while the next piece is waited for, and on
    behalf of this one: what is steered here is steered there. Where the iterator is left, `write`
    ends at its next piece.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    given: SimpleQueue[tuple[str | None, BaseException | None]] = SimpleQueue()

    def say(piece: str) -> None:
        given.put((piece, None))
        if not asked.get():
            raise _LeftError

    def run() -> None:
        failed: BaseException | None = None
        try:
            if asked.get():
                write(say)
        except BaseException as error:
            failed = error
        given.put((None, failed))

    with on_behalf_of_this_thread():
        thread = Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        while True:
            asked.put(True)
            piece, failed = given.get()
            if failed is not None:
                raise failed
            if piece is None:
                return
            yield piece
    finally:
        asked.put(False)
        thread.join()
