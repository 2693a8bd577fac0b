"""Runs a model for many requests at once: one thread, in which batches take turns.

Requests that wait together begin together, each with steerings of its own, and leave their batch
when they end, at whatever token that is. Later ones begin a batch of their own, which takes turns
with those that are under way, so that a short answer does not wait for a long one. Nothing is
shared between rows but the pass.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Event, Thread
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.model import (
    Fired,
    Growing,
    LanguageModel,
    Writing,
    are_sound,
    end_tokens,
    unsound,
)
from trimtab.serving.choosing import Chooser, Chosen, Settings
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


@dataclass(eq=False)
class _Batch:
    writing: Writing
    jobs: list[Job]
    choosers: list[Chooser]


class Engine:
    """A model that answers jobs until it is closed."""

    def __init__(self, language_model: LanguageModel, limits: Limits = Limits()) -> None:
        self._lm, self._limits = language_model, limits
        self._waiting: deque[Job] = deque()
        self._batches: list[_Batch] = []
        self._changed = Condition()
        self._closed = False
        self._ends = end_tokens(language_model.model.generation_config.eos_token_id)
        self._thread = Thread(target=self._run, name="trimtab engine", daemon=True)
        self._thread.start()

    # -- for everybody ------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Have a job answered; refuses it where as many wait as may."""
        with self._changed:
            if self._closed:
                raise FullError("the server ends")
            if len(self._waiting) >= self._limits.waiting:
                raise FullError(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.append(job)
            self._changed.notify()

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return sum(len(batch.jobs) for batch in tuple(self._batches))

    @property
    def waiting(self) -> int:
        """Texts that wait for a place."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End what is under way, and answer nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # -- in the engine's thread ---------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._batches or self._closed):
                    self._changed.wait()
                closed = self._closed
            if closed:
                self._end_all()
                return
            self._begin()
            for batch in tuple(self._batches):
                self._guarded(batch, partial(self._go_on, batch))

    def _end_all(self) -> None:
        with self._changed:
            jobs = [job for batch in self._batches for job in batch.jobs] + list(self._waiting)
            self._batches.clear()
            self._waiting.clear()
        for job in jobs:
            job.tell(Ended("closed"))

    def _begin(self) -> None:
        """Have those that wait begin, as far as there is room."""
        if len(self._batches) >= self._limits.batches:
            return
        jobs: list[Job] = []
        under_way = [job for batch in self._batches for job in batch.jobs]
        with self._changed:
            while self._waiting:
                job = self._waiting[0]
                if not self._is_over(job):
                    if not self._has_room(job, [*under_way, *jobs]):
                        break
                    jobs.append(job)
                self._waiting.popleft()
        for together in self._that_share(self._settled(jobs)):
            self._open(together)

    def _has_room(self, job: Job, beside: Sequence[Job]) -> bool:
        """Whether one more text may begin; one that is larger than all room there is has it for
        itself."""
        tokens = sum(each.most for each in (*beside, job))
        return not beside or (len(beside) < self._limits.rows and tokens <= self._limits.tokens)

    def _settled(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose steerings could be made."""
        found = []
        for job in jobs:
            try:
                job.acting = job.steerings()
            except Exception as error:
                job.tell(_in_words(error))
                continue
            found.append(job)
        return found

    def _that_share(self, jobs: list[Job]) -> list[list[Job]]:
        """Jobs that may share a batch: all, or, where the model does not pad, those of a length."""
        if len(jobs) < 2 or self._lm.pads("generate"):
            return [jobs] if jobs else []
        lengths = dict.fromkeys(len(job.tokens) for job in jobs)
        return [[job for job in jobs if len(job.tokens) == length] for length in lengths]

    def _open(self, jobs: list[Job]) -> None:
        """Read the prompts of some jobs, and write a token of each. Where that fails, each begins
        by itself, so that a job that cannot be answered harms no other."""
        try:
            writing = Writing(self._lm, [job.tokens for job in jobs], [job.acting for job in jobs])
            batch = _Batch(writing, jobs, [Chooser(job.settings, job.tokens) for job in jobs])
            logits = writing.logits()
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].tell(_in_words(error))
                return
            for job in jobs:
                self._open([job])
            return
        for job, gates in zip(jobs, writing.gates, strict=True):
            job.began, job.gates = time.monotonic(), gates
        self._batches.append(batch)
        self._guarded(batch, partial(self._write, batch, logits))

    def _guarded(self, batch: _Batch, act: Callable[[], None]) -> None:
        """A batch that fails ends with an error, and others go on."""
        try:
            act()
        except Exception as error:
            if batch in self._batches:
                self._batches.remove(batch)
            for job in batch.jobs:
                job.tell(_in_words(error))

    def _go_on(self, batch: _Batch) -> None:
        keep = [i for i, job in enumerate(batch.jobs) if not self._is_over(job)]
        self._keep(batch, keep)
        if batch.jobs:
            self._write(batch, batch.writing.logits())

    def _is_over(self, job: Job) -> bool:
        """Whether nobody waits for it, or it took too long."""
        if job.left.is_set():
            return True
        if job.late:
            job.tell(Ended("timeout"))
            return True
        return False

    def _write(self, batch: _Batch, logits: Tensor) -> None:
        """Choose a token of each text, tell of it, and leave those that end with it."""
        sound = are_sound(logits).tolist()
        likeliest = logits.argmax(-1).tolist()
        tokens, keep = [], []
        for i, (job, chooser) in enumerate(zip(batch.jobs, batch.choosers, strict=True)):
            if not sound[i]:
                labels = tuple(steering.label for steering in job.acting)
                job.tell(unsound("this request", labels, self._lm.dtype))
                tokens.append(likeliest[i])
                continue
            chosen = Chosen(likeliest[i]) if chooser.plain else chooser.choose(logits[i])
            chooser.note(chosen.token)
            tokens.append(chosen.token)
            if self._goes_on(job, chosen):
                keep.append(i)
        batch.writing.put(torch.tensor(tokens))
        self._keep(batch, keep)

    def _keep(self, batch: _Batch, rows: list[int]) -> None:
        if len(rows) == len(batch.jobs) and rows:
            return
        batch.jobs = [batch.jobs[row] for row in rows]
        batch.choosers = [batch.choosers[row] for row in rows]
        if rows:
            batch.writing.keep(rows)
        elif batch in self._batches:
            self._batches.remove(batch)

    def _goes_on(self, job: Job, chosen: Chosen) -> bool:
        """Tell of a token; whether the text goes on after it."""
        if chosen.token in self._ends:
            self._tell(job, job.text, final=True)
            job.tell(Ended("stop"))
            return False
        job.new.append(chosen.token)
        job.untold.append(chosen)
        job.text = self._lm.tokenizer.decode(job.new, skip_special_tokens=True)
        places = [job.text.find(stop) for stop in job.settings.stop if stop in job.text]
        if places:
            self._tell(job, job.text[: min(places)], final=True)
            job.tell(Ended("stop"))
            return False
        if len(job.new) >= job.settings.max_tokens:
            self._tell(job, job.text, final=True)
            job.tell(Ended("length"))
            return False
        self._tell(job, job.text)
        return True

    def _tell(self, job: Job, text: str, final: bool = False) -> None:
        """Hand on what is new of a text, but for what may still change or be cut off."""
        more = job.growing.rest(text) if final else job.growing.more(text)
        if more or job.untold:
            job.tell(Piece(more, tuple(job.untold)))
            job.untold.clear()


def _in_words(error: Exception) -> TrimtabError:
    """An error as a client may hear of it."""
    if isinstance(error, TrimtabError):
        return error
    _LOG.error("the engine failed", exc_info=error)
    return BrokenError(f"the engine failed ({type(error).__name__})")


class BrokenError(TrimtabError):
    """The engine failed at something that is not the request's fault; the log has it."""
