"""Work that may be interrupted: the batches that are there already, and the journal beside the
output that keeps them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from trimtab.errors import TrimtabError
from trimtab.files import Journal, check_output

Value = TypeVar("Value", str, float)


def checked_target(output: str | Path | None, overwrite: bool) -> Path | None:
    """Where the contrast is to be written, before the work; None where it is not."""
    if output is None:
        return None
    target = Path(output)
    if target.is_dir():
        raise TrimtabError(f"{target} is a directory: name a file")
    check_output(target, overwrite)
    return target


class Work:
    """The batches that are there already, and the journal beside the output that keeps them.

    Its first line has the settings, each other one a batch. Without an output there is no file.
    """

    def __init__(self, output: Path | None, settings: dict[str, Any], overwrite: bool) -> None:
        self.settings = settings
        self._begun = False
        self._waiting: deque[tuple[int, dict[str, Any]]] = deque()  # line number, batch
        self._journal: Journal | None = None
        if output is None:
            return
        path = output.with_name(output.name + ".part")
        self._journal = Journal(path, remedy="delete it, or pass overwrite")
        try:
            self._read(self._journal)
        except TrimtabError:
            if not overwrite:  # else the first batch replaces the file
                raise

    def _read(self, journal: Journal) -> None:
        lines = journal.read()
        if lines is None:
            return
        if not lines:
            journal.refuse("it has no settings")
        known = lines[0]
        keys = known.keys() | self.settings.keys()
        differing = sorted(k for k in keys if known.get(k) != self.settings.get(k))
        if differing:
            raise TrimtabError(
                f"{journal.path} holds unfinished work with other settings, which differ in "
                f"{', '.join(differing)}: choose another output, delete it, or pass overwrite"
            )
        self._waiting.extend(enumerate(lines[1:], 2))
        self._begun = True

    def next_batch(
        self, label: str, number: int, size: int, kind: type[Value]
    ) -> list[Value] | None:
        """The texts or numbers of the batch that comes next, or None where it is still to be
        made."""
        if not self._waiting or self._journal is None:
            return None
        line, batch = self._waiting.popleft()
        values = batch.get("texts")
        there = (batch.get("label"), batch.get("batch")) == (label, number)
        if not (there and _are(kind, values, size)):
            self._journal.refuse(f"it is not batch {number} of the {label} texts", line)
        return list(values or ())

    def append(self, label: str, number: int, values: Sequence[Value]) -> None:
        """Keep a batch."""
        batch = {"label": label, "batch": number, "texts": list(values)}
        if self._journal is None:
            return
        if self._begun:
            self._journal.append([batch])
        else:
            self._journal.replace([self.settings, batch])
            self._begun = True

    @property
    def resumes(self) -> bool:
        """Whether some of the work is done."""
        return self._begun

    def check_used(self) -> None:
        """More batches than the texts take are not this run's."""
        if self._waiting and self._journal is not None:
            self._journal.refuse("it is a batch too many", self._waiting[0][0])

    def remove(self) -> None:
        if self._journal is not None:
            self._journal.path.unlink(missing_ok=True)


def _are(kind: type, values: Any, size: int) -> bool:
    """Whether they are so many of one kind."""
    alike = isinstance(values, list) and all(isinstance(value, kind) for value in values)
    return alike and len(values) == size
