"""What is finished of the work, which is kept so that one that was interrupted goes on with the
very same numbers."""

from __future__ import annotations

import json
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
        #: How much was found now, and not by an earlier run.
        self.found = 0
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
            self.found += 1
        value: T = self._known[key]
        return value

    def knows(self, key: str) -> bool:
        """Whether it was found before."""
        return key in self._known
