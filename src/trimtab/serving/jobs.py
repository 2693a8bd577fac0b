"""What an engine answers: jobs, what is told of them, and where their texts end.

However a model runs, its tokens come to the same text: what is told of it, what is held back
because a stop text may have begun, and when it is over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Literal, NamedTuple, Protocol

from trimtab.errors import TrimtabError
from trimtab.model import Fired, Growing
from trimtab.serving.choosing import Chosen, Settings
from trimtab.steering import Steering

_LOG = logging.getLogger(__name__)

Reason = Literal["stop", "length", "timeout", "closed"]


class FullError(TrimtabError):
    """As many requests wait as may wait."""


class Piece(NamedTuple):
    """What an answer goes on with: text (which may be empty, where a character is not whole or a
    stop text may have begun), and the tokens that came."""

    text: str
    tokens: tuple[Chosen, ...]


class Ended(NamedTuple):
    """An answer is whole."""

    reason: Reason


#: What a request is told, in its order: pieces, and then an end or an error.
Told = Piece | Ended | TrimtabError


@dataclass(eq=False)
class Job:
    """One text to go on with. `steerings` makes its steerings when its turn comes, because a budget
    takes passes of the model; `tell` hears of everything that comes of it, in the engine's thread.
    """

    tokens: list[int]
    steerings: Callable[[], tuple[Steering, ...]]
    settings: Settings
    tell: Callable[[Told], None]
    deadline: float | None = None
    #: Nats that its one steering may change the next token by, where the engine finds the dial.
    kl: float | None = None
    #: Set by whoever no longer waits for it.
    left: Event = field(default_factory=Event)
    #: With what it is steered, known once it has begun, and what gates decided of its prompt.
    acting: tuple[Steering, ...] = ()
    gates: tuple[Fired, ...] = ()
    #: The tokens that were written.
    new: list[int] = field(default_factory=list)
    began: float | None = None
    #: The text of them; what of it was told; and the tokens that were not.
    text: str = ""
    growing: Growing = field(init=False)
    untold: list[Chosen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.growing = Growing(self.settings.stop)

    @property
    def most(self) -> int:
        """How many tokens it may come to."""
        return len(self.tokens) + self.settings.max_tokens

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


@dataclass(frozen=True)
class Limits:
    """How many texts are written at once, of how many tokens in all (with those that may still
    come), in how many batches, and how many texts may wait."""

    rows: int = 32
    tokens: int = 65_536
    batches: int = 4
    waiting: int = 256


class Answers(Protocol):
    """What answers jobs until it is closed."""

    @property
    def running(self) -> int:
        """Texts that are being written."""

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""

    @property
    def alive(self) -> bool: ...

    def submit(self, job: Job) -> None:
        """Have a job answered; refuses it where as many wait as may."""

    def close(self) -> None:
        """End what is under way, and answer nothing more."""


def goes_on(job: Job, chosen: Chosen, tokenizer: Any, ends: Collection[int]) -> bool:
    """Tell of a token; whether the text goes on after it."""
    if chosen.token in ends:
        _tell(job, job.text, final=True)
        job.tell(Ended("stop"))
        return False
    job.new.append(chosen.token)
    job.untold.append(chosen)
    job.text = tokenizer.decode(job.new, skip_special_tokens=True)
    places = [job.text.find(stop) for stop in job.settings.stop if stop in job.text]
    if places:
        _tell(job, job.text[: min(places)], final=True)
        job.tell(Ended("stop"))
        return False
    if len(job.new) >= job.settings.max_tokens:
        _tell(job, job.text, final=True)
        job.tell(Ended("length"))
        return False
    _tell(job, job.text)
    return True


def _tell(job: Job, text: str, final: bool = False) -> None:
    """Hand on what is new of a text, but for what may still change or be cut off."""
    more = job.growing.rest(text) if final else job.growing.more(text)
    if more or job.untold:
        job.tell(Piece(more, tuple(job.untold)))
        job.untold.clear()


def in_words(error: Exception) -> TrimtabError:
    """An error as a client may hear of it."""
    if isinstance(error, TrimtabError):
        return error
    _LOG.error("the engine failed", exc_info=error)
    return BrokenError(f"the engine failed ({type(error).__name__})")


class BrokenError(TrimtabError):
    """The engine failed at something that is not the request's fault; the log has it."""


class GoneError(BrokenError):
    """What runs the model has died or was closed, and this server answers no more."""

    def __init__(
        self, said: str = "the engine has died: this server ends, try again when it is back"
    ) -> None:
        super().__init__(said)
