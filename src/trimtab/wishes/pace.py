"""The minutes that there are, and how fast the work goes: at first as a few texts say, and then as
what has been done says.

What there is time for is decided when it is first asked and kept, so that a run that goes on leaves
out the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from trimtab.wishes.work import Work

#: So many seconds of the work weigh as much as what a few texts said before it began.
_BELIEVED = 4.0
#: What is kept back for the report: so many seconds, and a share of the minutes.
_REPORT, _SHARE = 4.0, 0.05


@dataclass(frozen=True)
class Speed:
    """Tokens a second that the model reads, and writes, many at once."""

    reads: float
    writes: float

    def seconds(self, read: float, written: float = 0.0) -> float:
        """For so many tokens."""
        return read / self.reads + written / self.writes


class Pace:
    """How long work takes, and whether there is time for it within the minutes (None: always)."""

    def __init__(self, minutes: float | None, work: Work) -> None:
        self._began = time.monotonic()
        self.minutes, self._work = minutes, work
        self._speed = Speed(1.0, 1.0)
        self._done: dict[str, list[float]] = {}

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until the report has to be written."""
        if self.minutes is None:
            return math.inf
        return 60 * self.minutes * (1 - _SHARE) - _REPORT - self.seconds

    def begin(self, speed: Speed) -> None:
        """What a few texts say of the speed."""
        self._speed = speed
        self._done = {
            "read": [speed.reads * _BELIEVED, _BELIEVED],
            "written": [speed.writes * _BELIEVED, _BELIEVED],
        }

    @property
    def speed(self) -> Speed:
        """As everything that was done says."""
        reads, writes = (tokens / took for tokens, took in self._done.values())
        return Speed(reads, writes)

    @contextmanager
    def reading(self, tokens: float) -> Iterator[None]:
        """Learns from work that reads so many tokens; nothing from what was found before."""
        yield from self._timed("read", tokens)

    @contextmanager
    def writing(self, tokens: float) -> Iterator[None]:
        """The same of work that writes them."""
        yield from self._timed("written", tokens)

    def _timed(self, kind: Literal["read", "written"], tokens: float) -> Iterator[None]:
        found, began = self._work.found, self.seconds
        yield
        if self._work.found > found:
            self.learn(kind, tokens, self.seconds - began)

    def learn(self, kind: Literal["read", "written"], tokens: float, seconds: float) -> None:
        """That so many tokens took so many seconds."""
        self._done[kind][0] += tokens
        self._done[kind][1] += seconds

    def allows(self, what: str, seconds: float) -> bool:
        """Whether there is time for something that takes so many seconds, with all that has to
        come after it; as it was decided when it was first asked."""
        if self.minutes is None:
            return True
        allowed: bool = self._work.recall(f"time for {what}", lambda: seconds <= self.left)
        return allowed
