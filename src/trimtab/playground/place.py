"""The playground of one model: its steerings, where runs are, and the one thread that runs it.

Whatever runs the model is done in that thread, in the order in which it was asked for. An answer is
written a token at a time, so that several browsers take turns; long work (a curve, a steering that
is made) is one turn. Conversations are the browsers' own: nothing of them is kept here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import TrimtabError
from trimtab.model import LanguageModel
from trimtab.playground.bodies import Message
from trimtab.playground.job import Act, Job
from trimtab.playground.shelf import Shelf
from trimtab.steering import Steering

T = TypeVar("T")
_END = object()


@dataclass(eq=False)
class Playground:
    """What the pages show: a model, its shelf of steerings, and a directory of runs."""

    language_model: LanguageModel
    shelf: Shelf
    runs: Path | None = None
    #: The long work that goes on, or the last one that did.
    job: Job | None = None
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "trimtab playground")
    )

    async def run(self, act: Callable[..., T], *given: Any, **more: Any) -> T:
        """What a function that runs the model returns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(act, *given, **more))

    async def each(self, items: Iterator[T]) -> AsyncIterator[T]:
        """What an iterator that runs the model has, item by item; others take turns between."""
        while True:
            item = await self.run(next, items, _END)
            if item is _END:
                return
            yield item

    def begin(self, job: Job, act: Act) -> Job:
        """Begin long work behind the pages; one at a time."""
        if self.job is not None and self.job.goes_on:
            raise TrimtabError(
                f"{self.job.name} is still being made here: wait until it is done, or stop it"
            )
        self.job = job
        self._thread.submit(job.work, act)
        return job

    def close(self) -> None:
        """Run nothing more."""
        if self.job is not None:
            self.job.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -- what every page asks for -----------------------------------------------------------------

    def tokens(self, messages: list[Message]) -> list[int]:
        """A conversation as the model reads it; without a chat template its texts, one after the
        other."""
        lm = self.language_model
        prompt: Any = "".join(one.content for one in messages)
        if lm.chats:
            prompt = [one.model_dump() for one in messages]
        (tokens,) = lm.fitting(lm.prompts([prompt], lm.chats))
        found = list(tokens)
        if not found:
            raise TrimtabError("there is nothing to answer: write something")
        return found

    def stack(self, asked: list[Any], tokens: list[int]) -> tuple[Steering, ...]:
        """Steerings that are asked for, each where its dial stands for a prompt."""
        return self.shelf.library.settled(self.wanted(asked), tokens)

    def wanted(self, asked: list[Any]) -> list[Any]:
        return self.shelf.library.wanted([one.asked for one in asked])
