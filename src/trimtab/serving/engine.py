"""Runs a model for many requests at once: one thread, in which batches take turns.

Requests that wait together begin together, each with steerings of its own, and leave their batch
when they end, at whatever token that is. Later ones begin a batch of their own, which takes turns
with those that are under way, so that a short answer does not wait for a long one. Nothing is
shared between rows but the pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Condition, Thread

import torch
from torch import Tensor

from trimtab.model import Fired, LanguageModel, Writing, are_sound, end_tokens, unsound
from trimtab.serving.choosing import Chooser, Chosen
from trimtab.serving.jobs import Ended, FullError, GoneError, Job, Limits, goes_on, in_words


@dataclass(eq=False)
class _Batch:
    writing: Writing
    jobs: list[Job]
    choosers: list[Chooser]


class Engine:
    """A model that answers jobs until it is closed; `force` lets steerings act that were made for
    other weights."""

    def __init__(
        self, language_model: LanguageModel, limits: Limits = Limits(), *, force: bool = False
    ) -> None:
        self._lm, self._limits, self._force = language_model, limits, force
        self._waiting: deque[Job] = deque()
        self._batches: list[_Batch] = []
        self._changed = Condition()
        self._closed = False
        self._ends = end_tokens(language_model.model.generation_config.eos_token_id)
        self._thread = Thread(target=self._run, name="trimtab engine", daemon=True)
        self._thread.start()

    # -- for everybody ------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Have a job answered; refuses it where as many wait as may, or once it is closed."""
        with self._changed:
            if self._closed:
                raise GoneError("the server ends")
            if len(self._waiting) >= self._limits.waiting:  # those that left take no place
                self._waiting = deque(job for job in self._waiting if not job.left.is_set())
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
        """Have those that wait begin, as far as there is room; those that are over wait no more."""
        jobs: list[Job] = []
        under_way = [job for batch in self._batches for job in batch.jobs]
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not self._is_over(job))
            if len(self._batches) >= self._limits.batches:
                return
            while self._waiting and self._has_room(self._waiting[0], [*under_way, *jobs]):
                jobs.append(self._waiting.popleft())
        for together in self._that_share(self._settled(jobs)):
            self._open(together)

    def _has_room(self, job: Job, beside: Sequence[Job]) -> bool:
        """Whether one more text may begin; one that is larger than all room there is has it for
        itself."""
        tokens = sum(each.most for each in (*beside, job))
        return not beside or (len(beside) < self._limits.rows and tokens <= self._limits.tokens)

    def _settled(self, jobs: Sequence[Job]) -> list[Job]:
        """Those whose steerings could be made, while somebody still waits for them: a budget takes
        its time."""
        found = []
        for job in jobs:
            if self._is_over(job):
                continue
            try:
                job.acting = job.steerings()
            except Exception as error:
                job.tell(in_words(error))
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
            texts, steerings = [job.tokens for job in jobs], [job.acting for job in jobs]
            writing = Writing(self._lm, texts, steerings, force=self._force)
            batch = _Batch(writing, jobs, [Chooser(job.settings, job.tokens) for job in jobs])
            logits = writing.logits()
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].tell(in_words(error))
                return
            for job in jobs:
                self._open([job])
            return
        for job, gates in zip(jobs, writing.gates, strict=True):
            job.began = time.monotonic()
            job.gates = tuple(
                replace(gate, new_tokens=0) if gate.kind == "token" else gate for gate in gates
            )
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
                job.tell(in_words(error))

    def _go_on(self, batch: _Batch) -> None:
        keep = [i for i, job in enumerate(batch.jobs) if not self._is_over(job)]
        self._keep(batch, keep)
        if batch.jobs:
            logits = batch.writing.logits()
            for job, fires in zip(batch.jobs, batch.writing.firing, strict=True):
                job.gates = _with_one_more(job, fires)
            self._write(batch, logits)

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
        # A text that ends here goes on with any token: nobody reads on.
        tokens, keep = likeliest.copy(), []
        for i, (job, chooser) in enumerate(zip(batch.jobs, batch.choosers, strict=True)):
            try:
                if not sound[i]:
                    labels = tuple(steering.label for steering in job.acting)
                    raise unsound("this request", labels, self._lm.dtype)
                chosen = Chosen(likeliest[i]) if chooser.plain else chooser.choose(logits[i])
                chooser.note(chosen.token)
                tokens[i] = chosen.token
                if goes_on(job, chosen, self._lm.tokenizer, self._ends):
                    keep.append(i)
            except Exception as error:  # of this text alone: those beside it go on
                job.tell(in_words(error))
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


def _with_one_more(job: Job, fires: Sequence[bool | None]) -> tuple[Fired, ...]:
    """What a job's gates decided, once one more token of its answer is read: at that the token
    gates among those of its steerings fired or not; None of the others."""
    gated = [fired for one, fired in zip(job.acting, fires, strict=True) if one.gate is not None]
    return tuple(
        gate
        if fired is None
        else replace(gate, fired=gate.fired or fired, new_tokens=(gate.new_tokens or 0) + fired)
        for gate, fired in zip(job.gates, gated, strict=True)
    )
