"""What is finished of the work, which is kept so that one that was interrupted goes on with the
very same numbers; and the clock, by which some of it may be left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from trimtab.files import Journal

T = TypeVar("T")


class Work:
    """What was found, by its key: a journal in the directory, or in memory where there is none.

    `salt` goes into the checksum of each line, so that a journal of another run is refused.
    """

    def __init__(self, directory: Path | None, salt: str) -> None:
        self._known: dict[str, Any] = {}
        self._journal: Journal | None = None
        if directory is None:
            return
        remedy = "choose another directory, or pass --overwrite"
        self._journal = Journal(directory / "work.jsonl", salt, remedy=remedy)
        for number, line in enumerate(self._journal.read() or (), 1):
            if line.keys() != {"key", "value"} or line["key"] in self._known:
                self._journal.refuse("it is nothing that was found, or found before", number)
            self._known[line["key"]] = line["value"]

    def recall(self, key: str, find: Callable[[], T]) -> T:
        """What is known by a key, or what `find` finds, which is then known: plain JSON."""
        if key not in self._known:
            found = json.loads(json.dumps(find(), allow_nan=False))
            if self._journal is not None:
                self._journal.append([{"key": key, "value": found}])
            self._known[key] = found
        value: T = self._known[key]
        return value

    def knows(self, key: str) -> bool:
        """Whether it was found before."""
        return key in self._known


class Clock:
    """How long it may take, where somebody has said so."""

    def __init__(self, minutes: float | None) -> None:
        self._began = time.monotonic()
        self.minutes = minutes

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def allows(self, seconds: float) -> bool:
        """Whether there is time for so many seconds of work."""
        return self.minutes is None or self.seconds + seconds <= 60 * self.minutes
